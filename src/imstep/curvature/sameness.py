"""Whether two tensors are one function of the parameters, as far as autograd's graph and their entries show it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import _disable_current_modes

from imstep.complexstep.islands import plain, unseen

BILINEAR = ("Mul", "Div", "Dot", "Mv", "Mm", "Bmm")
"""Autograd nodes, by the name of their operator, that are linear in each of two arguments."""

VIEWS = (
    *("View", "UnsafeView", "ReshapeAlias", "Alias", "Select", "Slice", "Split", "SplitWithSizes", "Unbind"),
    *("Squeeze", "Unsqueeze", "T", "Transpose", "Permute", "Expand", "AsStrided", "Unfold", "Diagonal"),
)

_AFFINE = (*VIEWS, *BILINEAR, "Add", "Sub", "Rsub", "Neg", "Clone", "ToCopy", "Sum", "Mean", "Index", "IndexSelect")
"""Linear in all arguments that depend on parameters, if it is one; plus a constant, which the graph may not keep."""

_KEEPING = ("Mul", "Div", "Dot", "Mv", "Mm", "Bmm", "Pow")
"""Two arguments that depend on parameters are kept both."""

_ADDEND = {"Addmm": 0, "Addmv": 0, "Baddbmm": 0, "Addbmm": 0, "Convolution": 2}
"""The one argument that is not kept, where the others are constants."""

_ADDING = ("Rsub", "MaskedFill", "ConstantPadNd", "NanToNum", "Threshold")
"""With numbers that the graph does not keep."""

_WRITES = "torch::autograd::CopySlices"  # which part of a tensor is not kept


def operator(node: Any) -> str:
    """The operator that a node belongs to: Mul for MulBackward0."""
    return "" if node is None else node.name().partition("Backward")[0]


def is_same(edges: Any, z: Tensor, other: Tensor) -> bool:
    """Whether two tensors, with the edges that they come from, are the same: one seen twice, or computed twice."""
    if _base(edges[0]) == _base(edges[1]):
        return _in_same_place(z, other) and z.is_conj() == other.is_conj()
    return is_alike(*edges) and is_equal(z, other)


def is_conjugate(edges: Any, z: Tensor, other: Tensor) -> bool:
    """Whether one of two tensors is the conjugate of the other."""
    through = (*VIEWS, "Conj")
    one, two = _base(edges[0], through), _base(edges[1], through)
    return one == two and _in_same_place(z, other) and z.is_conj() != other.is_conj()


def is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether the entries of two tensors are the same, but for rounding; those that are not numbers, too."""
    with unseen(), _disable_current_modes():
        a, b = plain(a).detach(), plain(b).detach()
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not (a.is_floating_point() or a.is_complex()):
            return torch.equal(a, b)
        return torch.allclose(a, b, 8 * torch.finfo(a.dtype).eps, 0, equal_nan=True)


def is_alike(a: Any, b: Any) -> bool:
    """Whether two edges are of the same function of the parameters, up to a constant where graphs do not keep it.

    The same operators act on the same leaves, with the same numbers. Sums keep no constants: x - y and x - z are alike.
    Where such sums are arguments of what is not linear, the graph must keep these, which shows that they are the same.
    """
    waiting, seen = [(a, b, True)], set()
    while waiting:
        pair = waiting.pop()
        if pair in seen or pair[0] == pair[1]:
            continue
        seen.add(pair)
        (one, number), (other, its_number), shifted = pair
        if one is None or other is None or number != its_number or not _does_the_same(one, other):
            return False
        edges, name = list(zip(one.next_functions, other.next_functions, strict=True)), operator(one)
        live = [pair for pair in edges if pair[0][0] is not None or pair[1][0] is not None]
        hides = edges[_ADDEND[name]] not in live if name in _ADDEND else len(live) < len(edges)
        if not shifted and (name in _ADDING or (hides and name not in BILINEAR)):
            return False
        kept = getattr(one, "_saved_self", None) is not None and (len(edges) == 1 or name in _KEEPING)
        affine = shifted and name in _AFFINE and not (name in BILINEAR and len(live) > 1)
        waiting += [(x, y, affine or (kept and len(live) == len(edges))) for x, y in live]
    return True


def _does_the_same(one: Any, other: Any) -> bool:
    """Whether two nodes are of the same operator, with what they keep: numbers, and entries of tensors."""
    if one.name() != other.name() or len(one.next_functions) != len(other.next_functions):
        return False
    if not one.next_functions or isinstance(one.node, BackwardCFunction) or operator(one) == _WRITES:
        return False  # other leaves; a Function says itself what it computes
    kept, its = _kept(one), _kept(other)
    return len(kept) == len(its) and all(map(_shows_the_same, kept, its))


def _kept(node: Any) -> list[Any]:
    names = [name for name in dir(node.node) if name.startswith("_saved_")]
    shapes = [(tuple(of.shape), of.dtype) for of in node._input_metadata]
    return [shapes, *(getattr(node, name) for name in names)]


def _shows_the_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return is_equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_shows_the_same, a, b))
    return type(a) is type(b) and bool(a == b)


def _base(edge: Any, through: tuple[str, ...] = VIEWS) -> Any:
    """What a tensor is a view of."""
    while operator(edge[0]) in through:
        edge = edge[0].next_functions[0]
    return edge


def _in_same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same entries of the same memory."""
    a, b = plain(a), plain(b)
    steps = [[step for n, step in zip(t.shape, t.stride(), strict=True) if n != 1] for t in (a, b)]
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and steps[0] == steps[1]
