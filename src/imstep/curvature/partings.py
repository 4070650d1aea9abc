"""Ways to part the entries of what a loss squares into groups of which each may be independent in itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.sameness import operator

Parting = Sequence[Tensor]
"""The numbers of the entries of each group."""

_IN_ORDER = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "Alias")
"""Operators that leave the entries in row-major order."""

_MOVES = ("Permute", "Transpose", "T")
"""And those that do where all dimensions but one are of one entry."""


def partings(z: Tensor) -> list[Parting]:
    """Those of an output, from coarse to fine, for all that it is computed from; none, where a way makes no sense."""
    entries, node = _unflattened(_numbers(z), z.grad_fn)
    several = entries.ndim > 1
    by_component = entries.flatten(1).unbind(1) if several else []
    # Equation by equation, where points run along the second dimension; of few rows, that is.
    by_row = entries.unbind(0) if several and len(entries) ** 2 <= entries.numel() else []
    return [[entries], [part for part, _ in _joined(entries, node)], by_component, by_row]


def pieces(z: Tensor) -> list[Tensor]:
    """The entries of what was put together to an output, each in the shape that it had before it was flattened."""
    return _pieces(_numbers(z), z.grad_fn)


def along_axes(entries: Tensor) -> list[Parting]:
    """For each dimension but those of one entry, what differs in no other; none, if there is but one."""
    dims = [at for at, n in enumerate(entries.shape) if n > 1]
    return [entries.movedim(at, -1).flatten(0, -2).unbind(0) for at in dims] if len(dims) > 1 else []


def _numbers(z: Tensor) -> Tensor:
    return torch.arange(z.numel(), device=z.device).view(z.shape)


def _pieces(numbers: Tensor, node: Any) -> list[Tensor]:
    entries, node = _unflattened(numbers, node)
    parts = _joined(entries, node)
    return [piece for part, parent in parts for piece in _pieces(part, parent)] if parts else [entries]


def _unflattened(numbers: Tensor, node: Any) -> tuple[Tensor, Any]:
    """Entries in the shape that they had before they were flattened, and the operator that computed that."""
    shape = numbers.shape
    while node is not None and sum(n > 1 for n in shape) < 2 and operator(node) in (*_IN_ORDER, *_MOVES):
        shape = torch.Size(getattr(node, "_saved_self_sym_sizes", shape))
        node = node.next_functions[0][0]
    return numbers.reshape(shape), node


def _joined(entries: Tensor, node: Any) -> list[tuple[Tensor, Any]]:
    """What was put together by ``torch.cat`` or ``torch.stack``, if it was, each part with its operator."""
    while operator(node) in _IN_ORDER:
        node = node.next_functions[0][0]
    parents = node.next_functions if operator(node) in ("Cat", "Stack") else ()
    if not parents or any(parent is None for parent, _ in parents) or len(parents) ** 2 > entries.numel():
        return []
    entries = entries.reshape(torch.Size(node._input_metadata[0].shape))
    dim = node._saved_dim - 2**64 if node._saved_dim >= 2**63 else node._saved_dim
    if operator(node) == "Stack":
        parts = entries.unbind(dim)
    else:
        shapes = [parent._input_metadata[number].shape for parent, number in parents]
        parts = entries.split([int(shape[dim]) for shape in shapes], dim)
    return [(part, parent) for part, (parent, _) in zip(parts, parents, strict=True)]
