"""One use of a parameter, and the rows that make up its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


@dataclass(frozen=True, eq=False)
class Rows:
    """What a use adds to the gradient of its parameter, row by row.

    Attributes:
        left: (R, out); for a parameter that is a vector, or used as one, the addends themselves, (R, entries).
        right: (R, in), where the addends are the outer products of left and right; else None.
    """

    left: Tensor
    right: Tensor | None


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


def in_reals(use: Use, of_complex: bool) -> list[Use] | None:
    """A use in an operator whose output is complex, as uses that add real rows; None where that cannot be told.

    The two parts of each entry of a complex parameter stand beside each other: l ⊗ r is Re(l) ⊗ r + Im(l) ⊗ ir.

    Args:
        of_complex: whether the parameter is complex; the gradient of a real one is the real part of the addends.
    """
    spread, other = use.spread, use.other
    if other is None:
        return [replace(use, spread=lambda d: _pairs(spread(d)) if of_complex else spread(d).real)]
    if not of_complex:
        return None
    if use.transposed:
        return [
            replace(use, spread=lambda d: _pairs(spread(d)), other=lambda: other().real),
            replace(use, spread=lambda d: _pairs(1j * spread(d)), other=lambda: other().imag),
        ]
    return [
        replace(use, spread=lambda d: spread(d).real, other=lambda: _pairs(other())),
        replace(use, spread=lambda d: spread(d).imag, other=lambda: _pairs(1j * other())),
    ]


def _pairs(rows: Tensor) -> Tensor:
    """Complex rows (R, k) as real ones, (R, 2k)."""
    return torch.view_as_real(rows.resolve_conj()).flatten(1)


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
        members: in a stack of matrix products, which of its matrices each takes; None for the first, second, ...
    """

    node: Any
    at: int
    transposed: bool
    shape: torch.Size
    parameter: int
    stacked: bool = False
    members: tuple[int, ...] | None = None

    @property
    def edge(self) -> GradientEdge:
        """Where the graph leaves the operator."""
        return GradientEdge(self.node, 0)


Found = Use | list[Use] | None
"""How a parameter is used in an operator; None where that cannot be told."""


def stacked_rows(p: Operand, addends: Callable[[Tensor], Tensor]) -> list[Use] | None:
    """A vector for each member of a stack, added to all of its rows: (E, 1, n) to (E, R, n)."""
    shape, members = p.node._input_metadata[0].shape, p.shape[0]
    if p.transposed or len(shape) != 3 or shape[0] != members or shape[2] != p.shape[1]:
        return None
    return [
        Use(p.parameter, p.edge, lambda d, e=e: addends(d)[e], member=(e, members))  # type: ignore[misc]
        for e in range(members)
    ]


def broadcast(p: Operand, addends: Callable[[Tensor], Tensor]) -> Found:
    """A parameter that is broadcast: the addends are rows over the dimensions along which it is.

    Where it is not, one row would belong to many residuals.
    """
    if p.stacked:
        return stacked_rows(p, addends)
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


def signed(*numbers: int) -> list[int]:
    """Dimensions and places as autograd keeps them: negative ones as unsigned."""
    return [n - 2**64 if n >= 2**63 else n for n in numbers]
