"""Residuals that are entries of parameters themselves, as a penalty on weights makes them.

The row of such a residual has a single entry. For a matrix of weights it is the outer product of two unit vectors, as
compact as the rows of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

_SHIFTS, _SCALES = {"AddBackward0", "SubBackward0"}, {"MulBackward0", "DivBackward0"}
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
    if id(z) in position:
        return None if z.is_complex() else [Direct(position[id(z)], number, 0)]
    node, scale = _stripped(z.grad_fn)
    own = _leaf(node, position)
    if own is not None:
        return [Direct(own, number, 0, scale)] if _entries(node) == z.numel() else None
    if node is None or node.name() != "CatBackward0" or len(node._input_metadata[0].shape) != 1:
        return None
    found, offset = [], 0
    for parent, at in node.next_functions:
        below, factor = _stripped(parent)
        own = _leaf(below, position)
        if own is None or _entries(below) != math.prod(parent._input_metadata[at].shape):
            return None
        end = offset + _entries(below)
        whole = scale[offset:end] if isinstance(scale, Tensor) else scale
        found.append(Direct(own, number, offset, whole * factor))
        offset = end
    return found


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
        edges, name = node.next_functions, node.name()
        below: Any = edges[0] if edges else None
        if name in _SHIFTS or name in _SCALES:
            if name == "MulBackward0" and edges[0][0] is None:
                below = edges[1]
            elif edges[1][0] is not None:
                break
            if below[0] is None or not _same_shape(node, below):
                break
        elif name not in _IN_ORDER:
            break
        if name in _SCALES:
            other = _factor(node._saved_self if below is edges[1] else node._saved_other, node)
            if other is None:
                break
            scale = scale * other if name == "MulBackward0" else scale / other
        node = below[0]
    return node, scale


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


def _leaf(node: Any, position: Mapping[int, int]) -> int | None:
    if node is None or node.name() != LEAF or node.variable.is_complex():
        return None
    return position.get(id(node.variable))


def _entries(node: Any) -> int:
    return int(node.variable.numel())
