"""Where a model uses its parameters, read off autograd's graph.

A weight W that multiplies rows a, y = W a, has the gradient Σ d aᵀ, d being the gradients at the rows of y: one outer
product a row. The graph holds the rows a; a backward pass to its node gives the rows d. This also finds the uses that
autograd makes itself, where a loss takes derivatives with respect to inputs: there W stands in the backward pass again,
x = Wᵀ b, and its gradient is Σ b dᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from imstep.complexstep.islands import plain

_LEAF = "torch::autograd::AccumulateGrad"
_REENTRANT = "CheckpointFunctionBackward"


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
    """

    parameter: int
    edge: GradientEdge
    spread: Callable[[Tensor], Tensor]
    other: Callable[[], Tensor] | None = None
    transposed: bool = False
    member: tuple[int, int] = (0, 1)

    def rows(self, spread: Tensor) -> Rows:
        """The addends for the rows of a gradient."""
        if self.other is None:
            return Rows(spread, None)
        other = self.other()
        return Rows(other, spread) if self.transposed else Rows(spread, other)


@dataclass(frozen=True, eq=False)
class Uses:
    """All uses of the parameters in a graph.

    Attributes:
        known: those whose rows can be told.
        unknown: positions of parameters that are used in other ways as well.
    """

    known: list[Use]
    unknown: set[int]


def find_uses(outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Uses:
    """The uses of parameters in what ``outputs`` are computed from.

    Known are linear layers and matrix products of two dimensions, stacks of them (as ``torch.func.vmap`` makes of an
    ensemble), convolutions with one group, and parameters that are added to or multiply a larger tensor. An output that
    is a parameter itself counts as unknown.

    Raises:
        ValueError: a reentrant checkpoint hides uses.
    """
    position = {id(p): at for at, p in enumerate(parameters)}
    uses = Uses([], {position[id(z)] for z in outputs if id(z) in position})
    waiting = [z.grad_fn for z in outputs]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == _REENTRANT:
            raise ValueError(
                "a reentrant checkpoint hides the uses of parameters from autograd's graph. Pass use_reentrant=False."
            )
        recognise = _KNOWN.get(node.name(), _nothing)
        for at, (parent, _) in enumerate(node.next_functions):
            leaf = _leaf(parent, position)
            if leaf is None:
                waiting.append(parent)
                continue
            found, transposed, stacked = leaf
            # Rows are real numbers, and products of complex ones have conjugates in their gradients.
            own = None
            if not _is_complex(node):
                own = recognise(Operand(node, at, transposed, parameters[found], found, stacked))
            if own is None:
                uses.unknown.add(found)
            else:
                uses.known.extend(own if isinstance(own, list) else [own])
    for use in uses.known:  # a parameter is a stack in all of its uses or in none
        if any(use.member[1] != other.member[1] for other in uses.known if other.parameter == use.parameter):
            uses.unknown.add(use.parameter)
    return uses


def _leaf(node: Any, position: dict[int, int]) -> tuple[int, bool, bool] | None:
    """The parameter that a node is, or is the transpose of; None for another node.

    Returns:
        Its position; whether it is transposed in its last two dimensions; whether it is seen as one slice for each
        member of a stack, of which each is the same for all rows: (E, 1, n) for (E, n).
    """
    transposed = stacked = False
    while node is not None and node.name() != _LEAF:
        name = node.name()
        if name == "TBackward0" or (name == "TransposeBackward0" and _swaps_last(node)):
            transposed = not transposed
        elif name in _VIEWS and not stacked and _gains_rows(node):
            stacked = True
        elif not (name in _VIEWS and _same_shape(node)) and not (name == "MulBackward1" and node._saved_other == 1):
            return None
        node = node.next_functions[0][0]
    if node is None or id(node.variable) not in position:
        return None
    return position[id(node.variable)], transposed, stacked


_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ExpandBackward0"}


def _swaps_last(node: Any) -> bool:
    dimensions = len(node._input_metadata[0].shape)
    return {int(d) % dimensions for d in _signed(node._saved_dim0, node._saved_dim1)} == {
        dimensions - 2,
        dimensions - 1,
    }


def _signed(*numbers: int) -> list[int]:
    """Dimensions as autograd keeps them: negative ones as unsigned."""
    return [n - 2**64 if n >= 2**63 else n for n in numbers]


def _same_shape(node: Any) -> bool:
    return tuple(node._saved_self_sym_sizes) == tuple(node._input_metadata[0].shape)


def _gains_rows(node: Any) -> bool:
    before, after = tuple(node._saved_self_sym_sizes), tuple(node._input_metadata[0].shape)
    return len(before) == 2 and after == (before[0], 1, before[1])


def _is_complex(node: Any) -> bool:
    """Whether what a node has computed is complex; all that is computed from complex numbers by a product is."""
    return any(output.dtype.is_complex for output in node._input_metadata)


# --- the operators --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Operand:
    """An argument of an operator that is a parameter, or the transpose of one.

    Attributes:
        node: of autograd's graph.
        at: which of its arguments.
        transposed: whether it is the parameter's transpose.
        tensor: the parameter.
        parameter: its position.
        stacked: whether it is (E, n), seen as (E, 1, n).
    """

    node: Any
    at: int
    transposed: bool
    tensor: Tensor
    parameter: int
    stacked: bool = False

    @property
    def edge(self) -> GradientEdge:
        """Where the graph leaves the operator."""
        return GradientEdge(self.node, 0)


Found = Use | list[Use] | None
"""How a parameter is used in an operator; None where that cannot be told."""


def _nothing(p: Operand) -> Found:
    return None


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
    if p.stacked or other is None or p.tensor.ndim != 3:
        return None
    members, transposed, uses = len(p.tensor), p.transposed != (p.at == 1), []
    for e in range(members):
        if p.at == 0:
            spread, rows = (lambda d, e=e: d[e].mT), (lambda e=e: other[e].detach().mT)
        else:
            spread, rows = (lambda d, e=e: d[e]), (lambda e=e: other[e].detach())
        uses.append(Use(p.parameter, p.edge, spread, rows, transposed, (e, members)))
    return uses


def _stacked_rows(p: Operand, addends: Callable[[Tensor], Tensor]) -> list[Use] | None:
    """A vector for each member of a stack, added to all of its rows: (E, 1, n) to (E, R, n)."""
    shape, members = p.node._input_metadata[0].shape, len(p.tensor)
    if p.transposed or len(shape) != 3 or shape[0] != members or shape[2] != p.tensor.shape[1]:
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


def _broadcast(p: Operand, addends: Callable[[Tensor], Tensor]) -> Found:
    """A parameter that is broadcast: the addends are rows over the dimensions along which it is.

    Where it is not, one row would belong to many residuals.
    """
    if p.stacked:
        return _stacked_rows(p, addends)
    if p.transposed or math.prod(p.node._input_metadata[0].shape) == p.tensor.numel():
        return None

    def spread(d: Tensor) -> Tensor:
        shape = (1,) * (d.ndim - p.tensor.ndim) + tuple(p.tensor.shape)
        repeated = [i for i, n in enumerate(shape) if n == 1]
        own = [i for i, n in enumerate(shape) if n != 1]
        return addends(d).permute(*repeated, *own).reshape(-1, p.tensor.numel())

    return Use(p.parameter, p.edge, spread)


def _convolution(p: Operand) -> Found:
    node, kernel = p.node, list(p.tensor.shape[2:])
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


_KNOWN: dict[str, Callable[[Operand], Found]] = {
    "MmBackward0": _mm,
    "BmmBackward0": _bmm,
    "AddmmBackward0": _addmm,
    "AddBackward0": _sum,
    "SubBackward0": _difference,
    "MulBackward0": _mul,
    "ConvolutionBackward0": _convolution,
}
"""For each operator, what tells how a parameter is used in it; None where it cannot tell."""
