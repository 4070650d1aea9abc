"""What each operator does with a parameter: which rows make up its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.islands import plain
from imstep.curvature.layer_rules import LAYER_RULES
from imstep.curvature.use import Found, Operand, Use, broadcast


def _mm(p: Operand) -> Use:
    return _product(p, p.at, lambda: plain(p.node._saved_mat2 if p.at == 0 else p.node._saved_self), 1)


def _addmm(p: Operand) -> Found:
    if p.at == 0:
        return broadcast(p, lambda d: _times(p.node._saved_beta, d))
    other = lambda: plain(p.node._saved_mat2 if p.at == 1 else p.node._saved_mat1)
    return _product(p, p.at - 1, other, p.node._saved_alpha)


def _product(p: Operand, at: int, other: Callable[[], Tensor], factor: Any) -> Use:
    """One factor of a matrix product: the gradient of the first is d otherᵀ, of the second otherᵀ d."""
    if at == 0:
        return Use(p.parameter, p.edge, lambda d: _times(factor, d.mT), lambda: _dense(other()).mT, p.transposed)
    return Use(p.parameter, p.edge, lambda d: _times(factor, d), lambda: _dense(other()), not p.transposed)


def _bmm(p: Operand) -> list[Use] | None:
    """A stack of matrix products: each matrix of the parameter has the rows of all products that take it."""
    first, second = p.node._saved_self, p.node._saved_mat2
    other = second if p.at == 0 else first
    if p.stacked or other is None or (p.members is None and len(p.shape) != 3):
        return None
    members = range(p.shape[0]) if p.members is None else p.members
    count, transposed, uses = max(members, default=0) + 1, p.transposed != (p.at == 1), []
    for e in range(count):
        own = [at for at, member in enumerate(members) if member == e]
        if p.at == 0:
            spread, rows = (lambda d, own=own: _rows(d.mT, own)), (lambda own=own: _rows(_dense(other).mT, own))
        else:
            spread, rows = (lambda d, own=own: _rows(d, own)), (lambda own=own: _rows(_dense(other), own))
        uses.append(Use(p.parameter, p.edge, spread, rows, transposed, (e, count)))
    return uses


def _rows(stack: Tensor, members: list[int]) -> Tensor:
    """Those of some matrices of a stack, one after the other."""
    return stack[members[0]] if len(members) == 1 else stack[members].flatten(0, 1)


def _sum(p: Operand) -> Found:
    sign = 1 if p.at == 0 else p.node._saved_alpha
    return broadcast(p, lambda d: _times(sign, d))


def _difference(p: Operand) -> Found:
    sign = 1 if p.at == 0 else -p.node._saved_alpha
    return broadcast(p, lambda d: _times(sign, d))


def _mul(p: Operand) -> Found:
    other = p.node._saved_other if p.at == 0 else p.node._saved_self
    return None if other is None else broadcast(p, lambda d: plain(other).detach().conj() * d)


def _div(p: Operand) -> Found:
    below = lambda: plain(p.node._saved_other).detach().conj()
    if p.at == 0:
        return broadcast(p, lambda d: d / below())
    # Squares of what is below may leave the range of its dtype.
    return broadcast(p, lambda d: -d * (plain(p.node._saved_self).detach().conj() / below() / below()))


def _expand(p: Operand) -> Found:
    return broadcast(p, lambda d: d)


def _repeat(p: Operand) -> Found:
    """Copies one after the other; along the first dimension and those before it, they are rows."""
    if p.transposed or p.stacked or any(n != 1 for n in p.node._saved_repeats[::-1][: len(p.shape) - 1]):
        return None
    return Use(p.parameter, p.edge, lambda d: d.reshape(-1, p.shape.numel()))


def _prelu(p: Operand) -> Found:
    return None if p.at == 0 else broadcast(p, lambda d: d * plain(p.node._saved_self).detach().clamp(max=0))


def _mv(p: Operand) -> Found:
    """A matrix times a vector: the rows of a parameter that is the vector are those of the matrix."""
    matrix, vector = p.node._saved_self, p.node._saved_vec
    if p.at == 0:
        return Use(p.parameter, p.edge, lambda d: d[None], lambda: plain(vector).detach().conj()[None], p.transposed)
    return Use(p.parameter, p.edge, lambda d: d[:, None] * _dense(plain(matrix)))


def _dot(p: Operand) -> Found:
    other = p.node._saved_tensor if p.at == 0 else p.node._saved_self
    return Use(p.parameter, p.edge, lambda d: (d * plain(other).detach().conj())[None])


def _dense(t: Tensor) -> Tensor:
    """What is multiplied with a parameter, as it stands in the gradient: conjugated; a sparse constant written out."""
    return (t.detach() if t.layout is torch.strided else t.detach().to_dense()).conj()


def _times(factor: Any, d: Tensor) -> Tensor:
    return d if factor == 1 else factor.conjugate() * d


RULES: dict[str, Callable[[Operand], Found]] = {
    "MmBackward0": _mm,
    "BmmBackward0": _bmm,
    "AddmmBackward0": _addmm,
    "AddBackward0": _sum,
    "SubBackward0": _difference,
    "MulBackward0": _mul,
    "DivBackward0": _div,
    "ExpandBackward0": _expand,
    "RepeatBackward0": _repeat,
    "MvBackward0": _mv,
    "DotBackward0": _dot,
    "PreluKernelBackward0": _prelu,
    **LAYER_RULES,
}
"""For each operator, what tells how a parameter is used in it; None where it cannot tell."""
