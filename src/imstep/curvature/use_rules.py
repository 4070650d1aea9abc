"""What each operator does with a parameter: which rows make up its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from imstep.complexstep.islands import plain


@dataclass(frozen=True, eq=False)
class Rows:
    """What a use adds to the gradient of its parameter, row by row.

    Attributes:
        left: (R, out); for a parameter that is a vector, or used as one, the addends themselves, (R, entries).
        right: (R, in), where the addends are the outer products of left and right; else None.
    """

    left: Tensor
    right: Tensor | None

    @property
    def size(self) -> float:
        """The sum of the norms of the addends."""
        norms = torch.linalg.vector_norm(self.left, dim=1, dtype=torch.float64)
        if self.right is not None:
            norms = norms * torch.linalg.vector_norm(self.right, dim=1, dtype=torch.float64)
        return float(norms.sum())


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a parameter.

    Attributes:
        parameter: position among the parameters.
        edge: where autograd's graph leaves the use.
        spread: from the gradient at that edge to its rows, (R, k).
        other: the rows (R, l) that they form outer products with; None where they are the addends themselves.
        transposed: whether those outer products are other ⊗ spread rather than spread ⊗ other.
        member: of a stack of layers, whose parameter has one slice for each, which layer it is, and of how many.
        lone: whether it is a vector that is added to, or multiplies, a batch of one row: that row may be of one
            residual, as a layer's is at a single point, or its entries of one each.
    """

    parameter: int
    edge: GradientEdge
    spread: Callable[[Tensor], Tensor]
    other: Callable[[], Tensor] | None = None
    transposed: bool = False
    member: tuple[int, int] = (0, 1)
    lone: bool = False

    def rows(self, spread: Tensor) -> Rows:
        """The addends for the rows of a gradient."""
        if self.other is None:
            return Rows(spread, None)
        other = self.other()
        return Rows(other, spread) if self.transposed else Rows(spread, other)


@dataclass(frozen=True, eq=False)
class Operand:
    """An argument of an operator that is a parameter, or the transpose of one.

    Attributes:
        node: of autograd's graph.
        at: which of its arguments.
        transposed: whether it is the parameter's transpose.
        shape: of the parameter.
        parameter: its position.
        stacked: whether it is (E, n), seen as (E, 1, n).
    """

    node: Any
    at: int
    transposed: bool
    shape: torch.Size
    parameter: int
    stacked: bool = False

    @property
    def edge(self) -> GradientEdge:
        """Where the graph leaves the operator."""
        return GradientEdge(self.node, 0)


Found = Use | list[Use] | None
"""How a parameter is used in an operator; None where that cannot be told."""


def _mm(p: Operand) -> Use:
    return _product(p, p.at, lambda: plain(p.node._saved_mat2 if p.at == 0 else p.node._saved_self), 1)


def _addmm(p: Operand) -> Found:
    if p.at == 0:
        return _broadcast(p, lambda d: _times(p.node._saved_beta, d))
    other = lambda: plain(p.node._saved_mat2 if p.at == 1 else p.node._saved_mat1)
    return _product(p, p.at - 1, other, p.node._saved_alpha)


def _product(p: Operand, at: int, other: Callable[[], Tensor], factor: Any) -> Use:
    """One factor of a matrix product: the gradient of the first is d otherᵀ, of the second otherᵀ d."""
    if at == 0:
        return Use(p.parameter, p.edge, lambda d: _times(factor, d.mT), lambda: other().detach().mT, p.transposed)
    return Use(p.parameter, p.edge, lambda d: _times(factor, d), lambda: other().detach(), not p.transposed)


def _bmm(p: Operand) -> list[Use] | None:
    """A stack of matrix products: each member's slice has the rows that it multiplies."""
    first, second = p.node._saved_self, p.node._saved_mat2
    other = second if p.at == 0 else first
    if p.stacked or other is None or len(p.shape) != 3:
        return None
    members, transposed, uses = p.shape[0], p.transposed != (p.at == 1), []
    for e in range(members):
        if p.at == 0:
            spread, rows = (lambda d, e=e: d[e].mT), (lambda e=e: other[e].detach().mT)
        else:
            spread, rows = (lambda d, e=e: d[e]), (lambda e=e: other[e].detach())
        uses.append(Use(p.parameter, p.edge, spread, rows, transposed, (e, members)))
    return uses


def _stacked_rows(p: Operand, addends: Callable[[Tensor], Tensor]) -> list[Use] | None:
    """A vector for each member of a stack, added to all of its rows: (E, 1, n) to (E, R, n)."""
    shape, members = p.node._input_metadata[0].shape, p.shape[0]
    if p.transposed or len(shape) != 3 or shape[0] != members or shape[2] != p.shape[1]:
        return None
    return [
        Use(p.parameter, p.edge, lambda d, e=e: addends(d)[e], member=(e, members))  # type: ignore[misc]
        for e in range(members)
    ]


def _sum(p: Operand) -> Found:
    sign = 1 if p.at == 0 else p.node._saved_alpha
    return _broadcast(p, lambda d: _times(sign, d))


def _difference(p: Operand) -> Found:
    sign = 1 if p.at == 0 else -p.node._saved_alpha
    return _broadcast(p, lambda d: _times(sign, d))


def _mul(p: Operand) -> Found:
    other = p.node._saved_other if p.at == 0 else p.node._saved_self
    return None if other is None else _broadcast(p, lambda d: plain(other).detach() * d)


def _div(p: Operand) -> Found:
    below = lambda: plain(p.node._saved_other).detach()
    if p.at == 0:
        return _broadcast(p, lambda d: d / below())
    return _broadcast(p, lambda d: -d * plain(p.node._saved_self).detach() / below().square())


def _expand(p: Operand) -> Found:
    return _broadcast(p, lambda d: d)


def _layer_norm(p: Operand) -> Found:
    node = p.node
    if p.at == 0:
        return None
    if p.at == 2:
        return _broadcast(p, lambda d: d)
    centred = lambda: plain(node._saved_input).detach() - node._saved_result1
    return _broadcast(p, lambda d: d * centred() * node._saved_result2)


def _layer_norm_backward(p: Operand) -> Found:
    """A normalisation's gradient with respect to its input: symmetric in what it makes of grad_out · weight."""
    node = p.node
    if p.at == 5:
        return []  # the shift has no part in it
    if p.at != 4:
        return None

    def addends(d: Tensor) -> Tensor:
        over = tuple(range(-len(node._saved_normalized_shape), 0))
        rate = node._saved_rstd
        normal = (plain(node._saved_input).detach() - node._saved_mean) * rate
        along = d - d.mean(over, keepdim=True) - normal * (d * normal).mean(over, keepdim=True)
        return plain(node._saved_grad_out).detach() * rate * along

    return _broadcast(p, addends)


def _prelu(p: Operand) -> Found:
    return None if p.at == 0 else _broadcast(p, lambda d: d * plain(p.node._saved_self).detach().clamp(max=0))


def _mv(p: Operand) -> Found:
    """A matrix times a vector: the rows of a parameter that is the vector are those of the matrix."""
    matrix, vector = p.node._saved_self, p.node._saved_vec
    if p.at == 0:
        return Use(p.parameter, p.edge, lambda d: d[None], lambda: plain(vector).detach()[None], p.transposed)
    return Use(p.parameter, p.edge, lambda d: d[:, None] * plain(matrix).detach())


def _dot(p: Operand) -> Found:
    other = p.node._saved_tensor if p.at == 0 else p.node._saved_self
    return Use(p.parameter, p.edge, lambda d: (d * plain(other).detach())[None])


def _broadcast(p: Operand, addends: Callable[[Tensor], Tensor]) -> Found:
    """A parameter that is broadcast: the addends are rows over the dimensions along which it is.

    Where it is not, one row would belong to many residuals.
    """
    if p.stacked:
        return _stacked_rows(p, addends)
    shape = p.node._input_metadata[0].shape
    lone = math.prod(shape) == p.shape.numel()
    if p.transposed or (lone and len(shape) <= len(p.shape)):
        return None

    def spread(d: Tensor) -> Tensor:
        shape = (1,) * (d.ndim - len(p.shape)) + tuple(p.shape)
        repeated = [i for i, n in enumerate(shape) if n == 1]
        own = [i for i, n in enumerate(shape) if n != 1]
        return addends(d).permute(*repeated, *own).reshape(-1, p.shape.numel())

    return Use(p.parameter, p.edge, spread, lone=lone)


def _convolution(p: Operand) -> Found:
    node, kernel = p.node, list(p.shape[2:])
    if p.at == 2:
        return Use(p.parameter, p.edge, lambda d: d.movedim(1, -1).reshape(-1, d.shape[1]))
    if p.at != 1 or node._saved_transposed or node._saved_groups != 1 or len(kernel) not in (1, 2):
        return None

    def patches() -> Tensor:
        input = plain(node._saved_input).detach()
        settings = [kernel, node._saved_dilation, node._saved_padding, node._saved_stride]
        if len(kernel) == 1:
            input = input.unsqueeze(2)
            settings = [[fill, *setting] for fill, setting in zip((1, 1, 0, 1), settings, strict=True)]
        unfolded = F.unfold(input, *settings).mT
        return unfolded.reshape(-1, unfolded.shape[-1])

    return Use(p.parameter, p.edge, lambda d: d.flatten(2).mT.reshape(-1, d.shape[1]), patches)


def _times(factor: Any, d: Tensor) -> Tensor:
    return d if factor == 1 else factor * d


RULES: dict[str, Callable[[Operand], Found]] = {
    "MmBackward0": _mm,
    "BmmBackward0": _bmm,
    "AddmmBackward0": _addmm,
    "AddBackward0": _sum,
    "SubBackward0": _difference,
    "MulBackward0": _mul,
    "DivBackward0": _div,
    "ExpandBackward0": _expand,
    "MvBackward0": _mv,
    "DotBackward0": _dot,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeLayerNormBackwardBackward0": _layer_norm_backward,
    "PreluKernelBackward0": _prelu,
    "ConvolutionBackward0": _convolution,
}
"""For each operator, what tells how a parameter is used in it; None where it cannot tell."""
