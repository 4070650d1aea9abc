"""Residuals that are entries of parameters themselves, as a penalty on weights makes them.

The row of such a residual has a single entry. For a matrix of weights it is the outer product of two unit vectors, as
compact as the rows of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.islands import plain
from imstep.curvature.derived import LEAF
from imstep.curvature.squares import Output
from imstep.curvature.use import Rows

_IN_ORDER = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "AliasBackward0"}
"""Operators that leave entries in row-major order."""

_SHIFTS: dict[str, Callable[[Any], tuple[float, float]]] = {
    "AddBackward0": lambda node: (1, node._saved_alpha),
    "SubBackward0": lambda node: (1, -node._saved_alpha),
    "RsubBackward0": lambda node: (-node._saved_alpha, 1),
    "RsubBackward1": lambda node: (-node._saved_alpha, 1),
    "NegBackward0": lambda _: (-1, 1),
}
"""Operators that add a constant to one of their arguments, and by what each is multiplied."""

_MOST_ADDED = 64
"""Terms of a sum of parameters that are looked at."""

_SCALES = {"MulBackward0", "DivBackward0"}
"""Operators of two arguments, of which the other one is a constant."""


@dataclass(frozen=True, eq=False)
class Direct:
    """A parameter within an output.

    Attributes:
        parameter: its position.
        output: the number of the output.
        offset: the entry of it that the first one of the parameter is; the others follow in row-major order.
        scale: times the parameter; a number, or one for each entry, (entries,).
    """

    parameter: int
    output: int
    offset: int
    scale: float | Tensor = 1.0

    def addends(self, outputs: Sequence[Output], like: Tensor) -> tuple[int, int, Tensor]:
        """The parameter; the residual of its first entry, which those of the others follow; the entries of the rows."""
        output = outputs[self.output]
        factor = output.factor.expand(output.z.shape).reshape(-1)[self.offset : self.offset + like.numel()]
        return self.parameter, output.start + self.offset, (factor * self.scale).to(like.dtype)


def direct_in(z: Tensor, number: int, position: Mapping[int, int]) -> list[Direct] | None:
    """The parameters that an output consists of, times and plus constants; None where it is made of more.

    Args:
        z: the output, and its number.
        position: of parameters, by identity.
    """
    found = _leaves_in(z)
    if found is None or any(id(leaf) not in position for leaf, *_ in found):
        return None
    offsets = [offset for leaf, offset, _ in found if leaf.numel()]
    if len(set(offsets)) < len(offsets):
        return None  # several in one entry
    return [Direct(position[id(leaf)], number, offset, scale) for leaf, offset, scale in found]


def diagonal_in(z: Tensor, second: Tensor, position: Mapping[int, int]) -> list[tuple[int, Tensor]]:
    """What a loss of parameters alone adds to their own curvature: positions and diagonals; none if it is of more.

    Args:
        z: its output, which may also be a sum of parameters.
        second: its second derivative in each entry of z.
        position: of parameters, by identity.
    """
    flat, found = second.reshape(-1), []
    for leaf, offset, scale in _leaves_in(z) or ():
        if id(leaf) in position:
            found.append((position[id(leaf)], flat[offset : offset + leaf.numel()] * scale * scale))
    return found


def of_parameters(z: Tensor) -> bool:
    """Whether an output consists of parameters or their sums, times and plus constants, as in penalties on weights."""
    return _leaves_in(z) is not None


def _leaves_in(z: Tensor) -> list[tuple[Tensor, int, float | Tensor]] | None:
    """The leaves that an output consists of, each with its offset and scale; None where it is made of more."""
    if z.is_leaf:
        return None if z.is_complex() else [(z, 0, 1.0)]
    added = _added(z.grad_fn)
    if added is not None:
        return [(leaf, 0, scale) for leaf, scale in added] if all(p.numel() == z.numel() for p, _ in added) else None
    node, scale = _stripped(z.grad_fn)
    if node is None or node.name() != "CatBackward0" or len(node._input_metadata[0].shape) != 1:
        return None
    found, offset = [], 0
    for parent, at in node.next_functions:
        below, factor = _stripped(parent)
        leaf = _leaf(below)
        if leaf is None or leaf.numel() != math.prod(parent._input_metadata[at].shape):
            return None
        end = offset + leaf.numel()
        whole = scale[offset:end] if isinstance(scale, Tensor) else scale
        found.append((leaf, offset, whole * factor))
        offset = end
    return found


def _added(node: Any) -> list[tuple[Tensor, float | Tensor]] | None:
    """The leaves whose sum a node makes, entry by entry, each once and with its factor; None where it makes more."""
    found: dict[int, tuple[Tensor, float | Tensor]] = {}
    waiting: list[tuple[Any, float | Tensor]] = [(node, 1.0)]
    while waiting:
        above, scale = waiting.pop()
        below, factor = _stripped(above)
        leaf, edges = _leaf(below), [] if below is None else below.next_functions
        if leaf is not None:
            found[id(leaf)] = leaf, scale * factor + (found[id(leaf)][1] if id(leaf) in found else 0.0)
            continue
        if below is None or below.name() not in _SHIFTS or len(waiting) > _MOST_ADDED:
            return None
        if any(parent is None or not _same_shape(below, (parent, at)) for parent, at in edges):
            return None
        factors = _SHIFTS[below.name()](below)
        waiting += [(parent, scale * factor * own) for (parent, _), own in zip(edges, factors, strict=False)]
    return list(found.values())


def entry_rows(addends: Tensor, width: int | None) -> Rows:
    """Rows (R, R) of one entry each: outer products, the left ones of ``width`` entries, or plain."""
    if width is None:
        return Rows(addends.diag(), None)
    index, other = torch.arange(len(addends), device=addends.device), len(addends) // width
    left, right = addends.new_zeros(len(addends), width), addends.new_zeros(len(addends), other)
    left[index, index // other] = addends
    right[index, index % other] = 1
    return Rows(left, right)


def _stripped(node: Any) -> tuple[Any, float | Tensor]:
    """Beneath operators that leave the entries where they are; by what constants they multiply them."""
    scale: float | Tensor = 1.0
    while node is not None:
        kept = _kept(node)
        if kept is None:
            break
        at, factor = kept
        node, scale = node.next_functions[at][0], scale * factor
    return node, scale


def _kept(node: Any) -> tuple[int, float | Tensor] | None:
    """The argument whose entries an operator leaves where they are, and their factor; None where it does more."""
    name, edges = node.name(), node.next_functions
    if name in _IN_ORDER:
        return 0, 1.0
    if name not in _SHIFTS and name not in _SCALES:
        return None
    own = [at for at, (below, _) in enumerate(edges) if below is not None]
    if len(own) != 1 or not _same_shape(node, edges[own[0]]):
        return None
    (at,) = own
    if name in _SHIFTS:
        return at, float(_SHIFTS[name](node)[at])
    other = None if at and name == "DivBackward0" else _factor(node._saved_self if at else node._saved_other, node)
    return None if other is None else (at, other if name == "MulBackward0" else 1 / other)


def _factor(other: Tensor | None, node: Any) -> float | Tensor | None:
    """A constant as a number, or as one for each entry of what a node makes; None where it is neither."""
    if other is None or other.is_complex():
        return None
    other = plain(other).detach()
    if other.numel() == 1:
        return float(other)
    return other.reshape(-1) if tuple(other.shape) == tuple(node._input_metadata[0].shape) else None


def _same_shape(node: Any, edge: Any) -> bool:
    parent, number = edge
    shape = parent.variable.shape if parent.name() == LEAF else parent._input_metadata[number].shape
    return tuple(shape) == tuple(node._input_metadata[0].shape)


def _leaf(node: Any) -> Tensor | None:
    return None if node is None or node.name() != LEAF or node.variable.is_complex() else node.variable
