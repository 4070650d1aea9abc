"""Where a model uses its parameters, read off autograd's graph.

A weight W that multiplies rows a, y = W a, has the gradient Σ d aᵀ, d being the gradients at the rows of y: one outer
product a row. The graph holds the rows a; a backward pass to its node gives the rows d. This also finds the uses that
autograd makes itself, where a loss takes derivatives with respect to inputs: there W stands in the backward pass again,
x = Wᵀ b, and its gradient is Σ b dᵀ.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.derived import LEAF, Derived, derived_nodes, shape_of
from imstep.curvature.direct import Direct, direct_in
from imstep.curvature.use import Operand, Rows, Use, in_reals, signed
from imstep.curvature.use_rules import RULES

__all__ = ["Rows", "Use", "Uses", "find_uses"]

_REENTRANT = "CheckpointFunctionBackward"


@dataclass(eq=False)
class Uses:
    """All uses of the parameters in a graph.

    Attributes:
        known: those whose rows can be told. Positions from the number of parameters on are those of ``derived``.
        unknown: positions of parameters that are used in other ways as well.
        derived: what is computed from parameters alone and used in their place, such as a weight that is normalised.
        direct: parameters that outputs consist of, each of whose entries is a residual.
        lone: whether some of ``known`` are of a batch of one row, whose entries may yet be of one residual each.
    """

    known: list[Use]
    unknown: set[int]
    derived: list[Derived]
    direct: list[Direct]
    lone: bool = False


def find_uses(
    outputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lone: bool = True,
    sources: frozenset[int] = frozenset(),
) -> Uses:
    """The uses of parameters in what ``outputs`` are computed from.

    Known are linear layers and products of matrices and vectors, stacks of them (as ``torch.func.vmap`` makes of an
    ensemble), convolutions, recurrent and bilinear layers, tables that are looked up by indices, the scale and shift of
    normalisations, and parameters that are added to, multiply or divide a larger tensor; so are the uses of what is
    computed from parameters alone, and outputs that are parameters themselves. A batch of one row counts with
    ``lone``, where the parameter meets larger ones as well. In ``sources`` are the positions of parameters that no data
    meet, only weights that are made of them.

    Raises:
        ValueError: a reentrant checkpoint hides uses.
    """
    return _Walk(outputs, parameters, lone, sources).uses


class _Walk:
    """Through a graph, from its outputs to the uses of parameters."""

    def __init__(
        self, outputs: Sequence[Tensor], parameters: Sequence[Tensor], lone: bool, sources: frozenset[int]
    ) -> None:
        self._parameters = parameters
        self._position = {id(p): at for at, p in enumerate(parameters)}
        self._pure = derived_nodes(outputs, self._position, sources)
        self._derived: dict[tuple[Any, int], int] = {}
        direct = [direct_in(z, number, self._position) for number, z in enumerate(outputs)]
        complex_ones = {self._position[id(z)] for z in outputs if z.is_complex() and id(z) in self._position}
        self.uses = Uses([], complex_ones, [], [one for found in direct for one in found or []])
        waiting = [z.grad_fn for z, found in zip(outputs, direct, strict=True) if found is None]
        seen: set[Any] = set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() == _REENTRANT:
                raise ValueError(
                    "a reentrant checkpoint hides the uses of parameters from autograd's graph. Pass "
                    "use_reentrant=False."
                )
            for at, (parent, number) in enumerate(node.next_functions):
                if parent is not None and not self._used(node, at, parent, number):
                    waiting.append(parent)
        self._withdraw(seen, lone)

    def _used(self, node: Any, at: int, parent: Any, number: int) -> bool:
        """Whether an argument of a node is a parameter, or made of some in a way that is known; noted if so."""
        spread = _spread_matrices(node, parent, number, self._pure)
        parent, number, turned, members = spread or (parent, number, False, None)
        leaf = _leaf(parent, self._position)
        if leaf is not None:
            found, transposed, stacked = leaf
            weight = self._parameters[found]
            own = _use(Operand(node, at, transposed != turned, weight.shape, found, stacked, members), weight.dtype)
            if own is None:
                self.uses.unknown.add(found)
        else:
            if parent not in self._pure or node in self._pure:
                return False
            key = parent, number
            index = self._derived.get(key, len(self._derived))
            theta = Derived(parent, number, self._pure[parent])
            place = len(self._parameters) + index
            own = _use(Operand(node, at, turned, theta.shape, place, members=members), theta.dtype)
            if own is None:
                return False
            if key not in self._derived:
                self._derived[key] = index
                self.uses.derived.append(theta)
        self.uses.known.extend(own or [])
        return True

    def _withdraw(self, seen: set[Any], lone: bool) -> None:
        """Leave to other means what is a stack in some of its uses only, or is derived and met otherwise as well, and
        what meets single rows, unless it meets more elsewhere and ``lone`` is set.
        """
        uses, count = self.uses, len(self._parameters)
        met = {use.parameter for use in uses.known if lone and not use.lone}
        members: dict[int, int] = {}
        for use in uses.known:
            doubtful = use.lone and use.parameter not in met
            if doubtful or members.setdefault(use.parameter, use.member[1]) != use.member[1]:
                uses.unknown.update(
                    [use.parameter] if use.parameter < count else uses.derived[use.parameter - count].parameters
                )
        uses.lone = any(use.lone and use.parameter in met for use in uses.known)
        for derived in uses.derived:
            if derived.node in seen:
                uses.unknown.update(derived.parameters)


def _use(p: Operand, dtype: torch.dtype) -> list[Use] | None:
    """How a parameter of some dtype is used; None where that cannot be told."""
    if p.node.name() not in RULES:
        return None
    own = RULES[p.node.name()](p)
    uses = [own] if isinstance(own, Use) else own
    if uses is None or not any(output.dtype.is_complex for output in p.node._input_metadata):
        return uses
    made = [in_reals(use, dtype.is_complex) for use in uses]
    return None if None in made else [use for two in made for use in two or []]


def _leaf(node: Any, position: dict[int, int]) -> tuple[int, bool, bool] | None:
    """The parameter that a node is, or is the transpose of; None for another node.

    Returns:
        Its position; whether it is transposed in its last two dimensions; whether it is seen as one slice for each
        member of a stack, of which each is the same for all rows: (E, 1, n) for (E, n).
    """
    transposed = stacked = False
    while node is not None and node.name() != LEAF:
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
_COPIES = {"CloneBackward0", "AliasBackward0", "UnsqueezeBackward0", "SqueezeBackward1"}


def _spread_matrices(
    node: Any, parent: Any, number: int, pure: Collection[Any]
) -> tuple[Any, int, bool, tuple[int, ...]] | None:
    """What a stack of matrix products takes a parameter from that is expanded for it, as vmap does.

    Returns:
        The node that makes the matrices, and its output; whether they are transposed; and which each product takes.
        None where nothing is expanded, or otherwise than over the dimensions before a matrix's own two.
    """
    turned, spread, above = False, False, []
    while node.name() == "BmmBackward0" and parent is not None and parent.name() != LEAF and parent not in pure:
        name, shape = parent.name(), shape_of(parent, number)
        below, number = parent.next_functions[0]
        turns = name == "TransposeBackward0" and _swaps_last(parent)
        matrix = shape[-2:][::-1] if turns else shape[-2:]
        if not (turns or name in _VIEWS | _COPIES) or below is None or shape_of(below, number)[-2:] != matrix:
            return None
        turned, spread = turned != turns, spread or name == "ExpandBackward0"
        above.append(shape[:-2])
        parent = below
    if not spread or parent is None:
        return None
    lead = shape_of(parent, number)[:-2]
    members = torch.arange(lead.numel()).view(lead)
    for shape in reversed(above):
        members = members.reshape(shape) if members.numel() == shape.numel() else members.expand(shape)
    return parent, number, turned, tuple(members.flatten().tolist())


def _swaps_last(node: Any) -> bool:
    dimensions = len(node._input_metadata[0].shape)
    return {int(d) % dimensions for d in signed(node._saved_dim0, node._saved_dim1)} == {
        dimensions - 2,
        dimensions - 1,
    }


def _same_shape(node: Any) -> bool:
    return tuple(node._saved_self_sym_sizes) == tuple(node._input_metadata[0].shape)


def _gains_rows(node: Any) -> bool:
    before, after = tuple(node._saved_self_sym_sizes), tuple(node._input_metadata[0].shape)
    return len(before) == 2 and after == (before[0], 1, before[1])
