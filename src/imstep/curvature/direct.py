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

from imstep.curvature.derived import LEAF
from imstep.curvature.squares import Output
from imstep.curvature.use import Rows

_IN_ORDER = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "AliasBackward0"}
"""Operators that leave entries in row-major order."""

_SHIFTS, _SCALES = {"AddBackward0", "SubBackward0"}, {"MulBackward0", "DivBackward0"}
"""Operators of two arguments, of which the other one is a constant."""


@dataclass(frozen=True)
class Direct:
    """A parameter within an output.

    Attributes:
        parameter: its position.
        output: the number of the output.
        offset: the entry of it that the first one of the parameter is; the others follow in row-major order.
        scale: times the parameter.
    """

    parameter: int
    output: int
    offset: int
    scale: float = 1.0

    def addends(self, outputs: Sequence[Output], like: Tensor) -> tuple[int, int, Tensor]:
        """The parameter; the residual of its first entry, which those of the others follow; the entries of the rows."""
        output = outputs[self.output]
        factor = output.factor.expand(output.z.shape).reshape(-1)[self.offset : self.offset + like.numel()]
        return self.parameter, output.start + self.offset, factor.to(like.dtype) * self.scale


def direct_in(z: Tensor, number: int, position: Mapping[int, int]) -> list[Direct] | None:
    """The parameters that an output consists of, times numbers and plus constants; None where it is made of more.

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
        found.append(Direct(own, number, offset, scale * factor))
        offset += _entries(below)
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


def _stripped(node: Any) -> tuple[Any, float]:
    """Beneath operators that leave the entries where they are, and multiply them all by a number; the number."""
    scale = 1.0
    while node is not None:
        edges, name = node.next_functions, node.name()
        if name in _SHIFTS or name in _SCALES:
            if edges[0][0] is None or edges[1][0] is not None or not _same_shape(node, edges[0]):
                break
        elif name not in _IN_ORDER:
            break
        if name in _SCALES:
            if node._saved_other is None or node._saved_other.numel() != 1:
                break
            other = float(node._saved_other.detach())
            scale = scale * other if name == "MulBackward0" else scale / other
        node = edges[0][0]
    return node, scale


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
