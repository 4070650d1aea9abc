"""What a model computes from its parameters alone, and uses in their place: θ = φ(w).

A weight that is normalised or masked, a rate that is kept positive, one minus the share of a gate: data do not enter,
so that the rows with respect to θ, found as those of a parameter, have only to be pulled back through φ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from imstep.curvature.parameters import as_reals

LEAF = "torch::autograd::AccumulateGrad"

_PRODUCTS = {"Mm", "Bmm", "Mv", "Dot", "Vdot", "Addmm", "LinalgSolveEx", "LinalgSolveTriangular"}
"""Operators that mix entries: with a constant among their arguments they are a layer that is applied to data."""

_PURE = _PRODUCTS | {
    *("Exp", "Expm1", "Log", "Log1P", "Softplus", "Sigmoid", "LogSigmoid", "Tanh", "Neg", "Pow", "Rsub", "Sqrt"),
    *("Rsqrt", "Reciprocal", "Abs", "Relu", "Sin", "Cos", "Clamp", "ClampMin", "Square", "Softmax", "Where", "Elu"),
    *("View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze", "Squeeze", "Permute", "T", "Transpose", "Select"),
    *("Slice", "Clone", "Alias", "Cat", "Stack", "Split", "Unbind", "ToCopy", "Tril", "Triu", "Diagonal", "Repeat"),
    *("Complex", "Polar", "ViewAsComplex", "ViewAsReal", "Real", "Imag", "Conj", "ResolveConj"),
    *("Sum", "Mean", "LinalgVectorNorm", "Norm", "WeightNormInterface", "Mul", "Div", "Add", "Sub"),
    *("DiagEmbed", "Cumsum", "Cumprod", "Flip", "Roll", "Rot90", "LogSoftmax", "Silu", "Gelu", "Maximum", "Minimum"),
    *("LinalgMatrixExp", "LinalgInvEx", "LinalgQr", "LinalgCholeskyEx", "LinalgHouseholderProduct", "MaskedFill"),
    *("ConstantPadNd", "BlockDiag", "Atan", "Sinh", "Cosh", "Tan", "Erf", "Hardtanh", "LeakyRelu", "Exp2"),
    *("FftR2C", "FftC2C", "FftC2R"),
}
"""Autograd nodes, by the name of their operator, that what is derived from parameters may consist of."""

_PLACED = {
    *("Index", "IndexSelect", "Gather", "Take", "Embedding"),
    *("IndexPut", "Scatter", "ScatterAdd", "IndexAdd", "IndexCopy", "MaskedScatter"),
    *("SliceScatter", "DiagonalScatter", "SelectScatter", "torch::autograd::CopySlices"),
}
"""Operators that put entries at places given by indices: those of a weight, or what belongs to data."""

_BLOCK = 2**22
"""Entries of rows that are pulled back at a time."""


@dataclass(frozen=True, eq=False)
class Derived:
    """A tensor θ that is a function of parameters.

    Attributes:
        node, number: the node of autograd's graph that computes it, and which of its outputs it is.
        parameters: positions of those that it depends on.
    """

    node: Any
    number: int
    parameters: frozenset[int]

    @property
    def shape(self) -> torch.Size:
        """Of θ."""
        return torch.Size(self.node._input_metadata[self.number].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of θ."""
        return self.node._input_metadata[self.number].dtype

    @property
    def entries(self) -> int:
        """Real numbers of θ."""
        return self.shape.numel() * (2 if self.dtype.is_complex else 1)

    def pull_back(self, rows: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """From rows (N, entries) with respect to θ to those of each parameter: position and (N, entries)."""
        positions = sorted(self.parameters)
        made: list[tuple[Tensor, ...]] = []
        for block in rows.split(max(1, _BLOCK // max(rows.shape[1], 1))):
            weights = block.to(self.dtype.to_real())
            if self.dtype.is_complex:
                weights = torch.view_as_complex(weights.reshape(-1, 2))
            made.append(
                torch.autograd.grad(
                    [GradientEdge(self.node, self.number)],
                    [tensors[at] for at in positions],
                    [weights.reshape(-1, *self.shape)],
                    retain_graph=True,
                    is_grads_batched=True,
                )
            )
        for at, *pieces in zip(positions, *made, strict=True):
            yield at, torch.cat([as_reals(piece).reshape(len(piece), -1).double() for piece in pieces])


def derived_nodes(
    outputs: Sequence[Tensor], position: dict[int, int], sources: frozenset[int] = frozenset()
) -> dict[Any, frozenset[int]]:
    """The nodes of a graph that compute something from parameters alone, with the positions of these.

    Args:
        outputs: where the graph begins.
        position: of each parameter, by its id.
        sources: positions of parameters that no data meet: what is looked up in them by indices, or put at some places,
            or comes of their products with constants, is derived from them as well.
    """
    entries = dict.fromkeys(sources, 0)
    found: dict[Any, frozenset[int] | None] = {None: frozenset()}
    waiting: list[Any] = [z.grad_fn for z in outputs]
    while waiting:
        node = waiting[-1]
        if node in found:
            waiting.pop()
            continue
        if node.name() == LEAF:
            at = position.get(id(node.variable))
            found[node] = None if at is None else frozenset([at])
            if at in entries:
                entries[at] = node.variable.numel()
            continue
        missing = [parent for parent, _ in node.next_functions if parent not in found]
        if missing:
            waiting += missing
            continue
        found[node] = _made_of(node, found, entries)
    return {node: made for node, made in found.items() if made and node.name() != LEAF}


def _made_of(node: Any, found: dict[Any, frozenset[int] | None], sources: dict[int, int]) -> frozenset[int] | None:
    """The parameters that a node's result depends on; None where it depends on something else.

    Args:
        sources: parameters that no data meet, with their entries.
    """
    name = node.name().partition("Backward")[0]
    if name not in _PURE and name not in _PLACED:
        return None
    made: set[int] = set()
    entries, constants = 0, False
    for parent, number in node.next_functions:
        own = found[parent]
        if own is None:
            return None
        made |= own
        constants |= parent is None
        if parent is not None:
            entries = max(entries, shape_of(parent, number).numel())
    # What a constant or an expansion makes larger has rows for data, which are those of a use.
    largest = max(torch.Size(output.shape).numel() for output in node._input_metadata)
    larger = largest > entries
    layer = name in _PRODUCTS and constants and larger and sum(n > 1 for n in shape_of(node, 0)) > 1
    few = name in _PRODUCTS or largest <= sum(sources.get(at, 0) for at in made) ** 2
    if made.issubset(sources) and few and not layer:
        return frozenset(made)
    if name in _PLACED or (constants and (larger or name in _PRODUCTS)) or (larger and name in ("Expand", "Repeat")):
        return None
    return frozenset(made)


def shape_of(node: Any, number: int) -> torch.Size:
    """Of an output of a node."""
    return node.variable.shape if node.name() == LEAF else torch.Size(node._input_metadata[number].shape)
