"""Sums, products and quotients of jets, and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imstep.pde.forward_mode import by_forward_mode
from imstep.pde.jet import Jet, broadcast, mapped, rule, shared, value_of


@rule("add", "__add__", "__radd__", fresh=True)
def _add(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    return _sum(input, other, 1, alpha)


@rule("sub", "subtract", "__sub__", fresh=True)
def _sub(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    return _sum(input, other, 1, -alpha)


@rule("rsub", "__rsub__", fresh=True)
def _rsub(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    return _sum(input, other, -alpha, 1)


def _sum(a: Any, b: Any, by_a: float, by_b: float) -> Jet:
    value = _scaled(value_of(a), by_a) + _scaled(value_of(b), by_b)
    pieces = [(t, factor) for t, factor in ((a, by_a), (b, by_b)) if isinstance(t, Jet)]
    first = [_scaled(broadcast(t.first, value), factor) for t, factor in pieces]
    second = [_scaled(broadcast(t.second, value), factor) for t, factor in pieces if t.second is not None]
    return Jet(value, _total(first), _total(second) if second else None, shared(a, b))


def _scaled(t: Any, factor: float) -> Any:
    return t if factor == 1 else factor * t


def _total(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@rule("mul", "multiply", "__mul__", "__rmul__", fresh=True)
def _mul(input: Any, other: Any) -> Jet:
    return _bilinear(torch.mul, input, other, elementwise=True)


@rule("div", "divide", "true_divide", "__truediv__", fresh=True)
def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return torch.div(value_of(input), value_of(other), rounding_mode=rounding_mode)
    if isinstance(other, Jet):
        return input * other.reciprocal()
    if isinstance(other, Tensor):
        other = other.to(torch.result_type(input.value, other))  # an inverse in less would be rounded
    elif isinstance(other, np.generic):
        other = other.item()
    return _bilinear(torch.mul, input, 1 / other, elementwise=True)


@rule("__rtruediv__", "__rdiv__", fresh=True)
def _rdiv(input: Jet, other: Any) -> Any:
    return other * input.reciprocal()


@rule("matmul", "__matmul__", "mm", "bmm", fresh=True)
def _matmul(input: Any, other: Any) -> Jet:
    return _bilinear(torch.matmul, input, other, elementwise=False)


@rule("__rmatmul__", fresh=True)
def _rmatmul(input: Any, other: Any) -> Jet:
    return _bilinear(torch.matmul, other, input, elementwise=False)


@rule("tensordot")
def _tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Any:
    return _bilinear(lambda a, b: torch.tensordot(a, b, dims), a, b, elementwise=False)


@rule("einsum")
def _einsum(equation: str, *operands: Any) -> Any:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    jets = [at for at, t in enumerate(operands) if isinstance(t, Jet)]
    if len(jets) != 1:
        return by_forward_mode(lambda *t: torch.einsum(equation, *t), operands, {})
    before, after = operands[: jets[0]], operands[jets[0] + 1 :]
    return mapped(lambda t: torch.einsum(equation, *before, t, *after), operands[jets[0]])


def _bilinear(product: Callable[[Any, Any], Tensor], a: Any, b: Any, *, elementwise: bool) -> Jet:
    """The jet of a product: (ab)'' = a''b + 2 a'b' + ab''."""
    value = product(value_of(a), value_of(b))
    wide = (lambda t: broadcast(t, value)) if elementwise else (lambda t: t)
    batched, left, right = (
        product if elementwise else _each(product, *dims) for dims in ((0, 0), (0, None), (None, 0))
    )
    first, second = [], []
    if isinstance(a, Jet):
        first.append(left(wide(a.first), value_of(b)))
        if a.second is not None:
            second.append(left(wide(a.second), value_of(b)))
    if isinstance(b, Jet):
        first.append(right(value_of(a), wide(b.first)))
        if b.second is not None:
            second.append(right(value_of(a), wide(b.second)))
    combination = shared(a, b)
    if isinstance(a, Jet) and isinstance(b, Jet) and combination.rows:
        second.append(2 * combination.of(batched(wide(a.first), wide(b.first))))
    return Jet(value, _total(first), _total(second) if second else None, combination)


def _each(product: Callable[[Any, Any], Tensor], *dims: int | None) -> Callable[[Any, Any], Tensor]:
    """A product along first axes, also of tensors that carry derivatives of another expansion."""
    all_of = torch.vmap(product, dims)

    def apply(a: Any, b: Any) -> Tensor:
        nested = isinstance(a, Jet) or isinstance(b, Jet)
        return _bilinear(all_of, a, b, elementwise=False) if nested else all_of(a, b)

    return apply


@rule("linear", fresh=True)
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(input, Jet) or isinstance(weight, Jet) or isinstance(bias, Jet):
        product = _matmul(input, weight.mT)
        return product if bias is None else _add(product, bias)
    second = None if input.second is None else F.linear(input.second, weight)
    return Jet(F.linear(input.value, weight, bias), F.linear(input.first, weight), second, input.combination)
