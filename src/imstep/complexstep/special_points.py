"""Functions whose gradient PyTorch writes by a formula that holds at single points only, written so that it holds.

They stand in for the originals where such points are met: see :mod:`imstep.complexstep.substitutes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imstep.complexstep.rules.special import i1_over

# --- products with zeros ----------------------------------------------------------------------------------------------


def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`torch.cumprod`, whose gradient at zeros is a formula that holds only there and so has no derivative."""
    return torch.stack(list(accumulate(x.to(dtype or x.dtype).unbind(dim), torch.mul)), dim)


def prod(x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`torch.prod`, whose gradient is a constant where there are two zeros."""
    x = x.to(dtype or x.dtype)
    total = reduce(torch.mul, x.reshape(-1).unbind(0) if dim is None else x.unbind(dim))
    return total.unsqueeze(dim) if keepdim and dim is not None else total


def scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """:func:`torch.scatter_reduce` by products, one entry of every line after the other."""
    total = x if include_self else x.scatter(dim, index, 1.0)
    for at, factor in zip(index.split(1, dim), src.split(1, dim), strict=False):
        factor = factor[tuple(slice(n) for n in at.shape)]
        total = total.scatter(dim, at, total.gather(dim, at) * factor)
    return total


def index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """:func:`torch.index_reduce` by products."""
    lines = [1] * source.dim()
    lines[dim] = -1
    return scatter_reduce(x, dim, index.view(lines).expand(source.shape), source, reduce, include_self=include_self)


def segment_reduce(
    x: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    initial: Any = None,
    **_: Any,
) -> Tensor:
    """:func:`torch.segment_reduce` by products along the first dimension."""
    sizes = lengths if lengths is not None else torch.diff(offsets)  # type: ignore[arg-type]
    start = 0 if offsets is None else int(offsets[0])
    parts = x[start : start + int(sizes.sum())].split(sizes.tolist())
    products = torch.stack([prod(part, 0) if len(part) else torch.ones_like(x[0]) for part in parts])
    return products if initial is None else products * initial


def in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that writes what ``function`` finds over its first argument."""
    return lambda x, *args, **kwargs: x.copy_(function(x.clone(), *args, **kwargs))


# --- smooth functions whose gradient is a formula that holds at one point only ---------------------------------------


def sinc(x: Tensor) -> Tensor:
    """:func:`torch.sinc`, by its series near zero: sum (-1)^k (pi x)^2k / (2k + 1)!."""
    near = x.abs() < 0.25
    square, series = (math.pi * torch.where(near, x, 0)).square(), torch.zeros_like(x)
    for k in reversed(range(11)):
        series = series * -square + 1 / math.factorial(2 * k + 1)
    angle = math.pi * torch.where(near, 1, x)
    return torch.where(near, series, torch.sin(angle) / angle)


def bessel_i1(x: Tensor) -> Tensor:
    """:func:`torch.special.i1`, by its series near zero."""
    near = x.abs() < 1
    small = torch.where(near, x, 0)
    return torch.where(near, small * i1_over(small), torch.special.i1(torch.where(near, 1, x)))


def power(x: Tensor, exponent: Tensor) -> Tensor:
    """:func:`torch.pow`, whose derivative by x is a constant where the exponent is zero: there by the exponential."""
    at_zero = (exponent == 0) & (x > 0)
    smooth = torch.exp(torch.where(at_zero, exponent, 0) * torch.log(torch.where(at_zero, x, 1)))
    return torch.where(at_zero, smooth, torch.pow(x, torch.where(at_zero, 1, exponent)))


def float_power(x: Tensor, exponent: Tensor) -> Tensor:
    """:func:`torch.float_power`."""
    return power(x.double(), exponent.double())


def logaddexp(x: Tensor, other: Tensor) -> Tensor:
    """:func:`torch.logaddexp`, whose gradient overflows where one term is far below the other."""
    for z, c in ((x, other), (other, x)):  # beside a constant, as of log(1 + exp z), a convex function of z is seen
        alone = not c.requires_grad and torch._C._functorch.maybe_current_level() is None
        if alone and bool(((c >= 0) & c.isfinite()).all()):
            return c - F.logsigmoid(c - z)
    same = (x == other) & x.isinf()
    first, second = torch.where(same, 0, x), torch.where(same, 0, other)
    largest = torch.where(first > second, first, second)
    smallest = torch.where(first > second, second, first)
    return torch.where(same, x, largest - F.logsigmoid(largest - smallest))


def logaddexp2(x: Tensor, other: Tensor) -> Tensor:
    """:func:`torch.logaddexp2`."""
    return logaddexp(x * math.log(2), other * math.log(2)) / math.log(2)


# --- roots, where a sum that they are taken of vanishes --------------------------------------------------------------


def dist(x: Tensor, other: Tensor, p: float = 2.0) -> Tensor:
    """:func:`torch.dist`, as the norm that it is."""
    return torch.linalg.vector_norm(x - other, p)


def polar(r: Tensor, angle: Tensor) -> Tensor:
    """The number of :func:`torch.polar`, whose gradient by the radius has the wrong sign below 0, and is 0 at 0."""
    return torch.complex(r * torch.cos(angle), r * torch.sin(angle))


def lp_pool(original: Callable[..., Tensor], pool: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    """A power-average pooling, with windows of zeros by a norm: PyTorch guards their gradient by a constant."""

    def pooled(x: Tensor, p: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:
        kernel = _several(kernel_size, dims)
        if ceil_mode or not 0 < p < math.inf or bool(pool((x.detach() != 0).to(x), kernel, stride).all()):
            return original(x, p, kernel_size, stride, ceil_mode)
        windows, inner = x, tuple(range(-dims, 0))
        for at, size, step in zip(inner, kernel, _several(kernel if stride is None else stride, dims), strict=True):
            windows = windows.unfold(at - (windows.dim() - x.dim()), size, step)
        if p == 1:
            return windows.sum(inner)
        nothing = (windows == 0).flatten(-dims).all(-1)
        powers = torch.where(nothing, 1, windows.pow(p).sum(inner))
        return torch.where(nothing, torch.linalg.vector_norm(windows, p, inner), powers.pow(1 / p))

    return pooled


def _several(number: Any, count: int) -> list[int]:
    return [number] * count if isinstance(number, int) else [*number] * (count // len(number))
