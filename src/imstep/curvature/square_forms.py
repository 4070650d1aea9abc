"""The forms in which squares stand in autograd's graph: powers, products, mean squared errors, squares of norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import _disable_current_modes

from imstep.complexstep.graph import leads_to
from imstep.complexstep.islands import plain, unseen
from imstep.complexstep.later import later_grad

LINEAR = (
    *("Add", "Sub", "Neg", "Sum", "Mean", "Mul", "Div", "Stack", "Cat", "View", "UnsafeView", "ReshapeAlias"),
    *("Squeeze", "Unsqueeze", "Expand", "Select", "Slice", "Index", "Permute", "T", "Transpose", "Clone", "ToCopy"),
    *("Alias", "Split", "Unbind", "Where", "MaskedFill", "ViewAsReal", "Dot", "Mv", "Mm", "Bmm", "Trace", "Diagonal"),
    *("Cumsum", "IndexSelect", "Gather", "MaskedSelect", "IndexAdd", "ScatterAdd", "Flip", "Roll", "Repeat", "Unfold"),
    *("Nansum", "Sort", "Topk", "AvgPool2D", "AvgPool3D", "ConstantPadNd", "Tril", "Triu"),
)
"""Autograd nodes, by the name of their operator, that are linear in each of their differentiable arguments."""

_BILINEAR = ("Mul", "Div", "Dot", "Mv", "Mm", "Bmm")
_MULTIPLES = ("Mul", "Div", "Neg")
_OF_ONE = ("Add", "Mul", "Div", "View", "Clone", "ToCopy", "Squeeze", "Select")  # linear, entry by entry, mostly rising
_VIEWS = (
    *("View", "UnsafeView", "ReshapeAlias", "Alias", "Select", "Slice", "Split", "SplitWithSizes", "Unbind"),
    *("Squeeze", "Unsqueeze", "T", "Transpose", "Permute", "Expand", "AsStrided", "Unfold", "Diagonal"),
)
_PLAIN = (*_VIEWS, "Clone", "Neg", "Abs", "Index", "IndexSelect")
"""Functions of one differentiable argument, told by what their nodes keep."""

_ADDING = ("Add", "Sub", "Stack", "Cat", "Where", "IndexAdd", "ScatterAdd")
"""Those that join arguments, of which one may be a constant for autograd."""

_MONOTONE = ("Sqrt", "LinalgVectorNorm", "Norm", "Dist", "Log", "Log1P", "Log2", "Log10")
"""Functions of a sum of squares that have its minima."""

_MEAN = 1  # how autograd's graph notes the reduction of a mean squared error


@dataclass(frozen=True, eq=False)
class Square:
    """A node whose result is a square, or a sum or mean of squares, each entry of its own z.

    Attributes:
        node: of autograd's graph.
        parts: the tensor z that is squared, or two whose difference is; real.
        share: factor of each square in the result: 1, or 1/n for a mean.
        shape: the one to which what is passed back to the node is brought before it is spread over z; None as it is.
        scale: c where the node squares c ‖z‖, of the shape of the norms; None for 1.
        weights: c where the node multiplies z by c z, of the shape of z; None for 1.
        beneath: S where the node squares c √S, and S is a sum of squares; there are no parts then.
    """

    node: Any
    parts: tuple[Tensor, ...]
    share: float = 1.0
    shape: tuple[int, ...] | None = None
    scale: Tensor | None = None
    weights: Tensor | None = None
    beneath: GradientEdge | None = None

    def factor(self, passed: Tensor) -> Tensor:
        """Of each z², or of S, from what is passed back to the node."""
        passed = passed.real if passed.is_complex() else passed
        passed = passed if self.scale is None else passed.reshape(self.scale.shape) * self.scale.square()
        passed = passed if self.shape is None else passed.reshape(self.shape)
        return passed if self.weights is None else passed * self.weights


@dataclass(frozen=True)
class Form:
    """A node as a linear combination of squares.

    Attributes:
        squares: empty if it has another form.
        constants: whether constants are added to them.
        obstacle: the name of a node that is in the way of one; "" where squares are missing for another reason.
    """

    squares: tuple[Square, ...]
    constants: bool = False
    obstacle: str = ""


def form_of(root: Any, parameters: Sequence[Tensor] | None = None) -> Form:
    """The squares that a node is a linear combination of, as far as autograd's graph shows it.

    Args:
        parameters: what the squares are functions of; what depends on none of them is a constant, though it requires
            gradients: weights that another optimizer trains, a zero that a sum begins with. None: all that does.
    """
    found: dict[Any, Square] = {}
    seen, waiting, constants = set(), [root], False
    while waiting:
        node = waiting.pop()
        if node in seen or node in found:
            continue
        seen.add(node)
        name = operator(node)
        square = _FORMS.get(name, lambda node: None)(node)
        if square is not None:
            found[node] = square
            continue
        parents = [parent for parent, _ in node.next_functions if parent is not None] if node is not None else []
        leaf = not parents
        if name in _BILINEAR and len(parents) > 1 and parameters is not None:
            parents = [parent for parent in parents if leads_to(parent, parameters)]
        divides = name == "Div" and node.next_functions[0][0] not in parents
        if name not in LINEAR or not parents or divides or (name in _BILINEAR and len(parents) > 1):
            if parameters is not None and not leads_to(node, parameters):
                constants = True
                continue
            return Form((), obstacle="a parameter" if leaf else node.name())
        if name == "Mul":
            within = form_of(parents[0], parameters)
            if not within.squares and not _by_zero(node):  # as 0 * p.sum(), so that each parameter has a gradient
                return within
            found.update({square.node: square for square in within.squares})
            constants |= within.constants
            continue
        constants |= name == "MaskedFill" or (name in _ADDING and len(parents) < len(node.next_functions))
        waiting += reversed(parents)
    return Form(tuple(found.values()), constants)


def operator(node: Any) -> str:
    """The operator that a node belongs to: Mul for MulBackward0."""
    return "" if node is None else node.name().partition("Backward")[0]


def _by_zero(node: Any) -> bool:
    """Whether a product is that of one differentiable factor and of zeros."""
    if None not in [parent for parent, _ in node.next_functions]:
        return False
    factor = node._saved_other if node.next_functions[0][0] is not None else node._saved_self
    with unseen(), _disable_current_modes():  # to which a number that a node keeps is no tensor
        return factor is not None and not bool(plain(factor).any())


def is_monotone(root: Any) -> bool:
    """Whether a node is, but for constants, a function of one sum of squares, if it is one, that has its minima."""
    while operator(root) in _OF_ONE and (below := _only_factor(root)) is not None:
        root = below[0]
    return operator(root) in _MONOTONE


def _power(node: Any) -> Square | None:
    (base, _), *exponent = node.next_functions
    if base is None or any(edge is not None for edge, _ in exponent):
        return None  # a power of what is trained, though it be 2 now
    z, power = plain(node._saved_self), node._saved_exponent
    if isinstance(power, Tensor) and torch.broadcast_shapes(z.shape, power.shape) != z.shape:
        return None  # each entry of z is several residuals
    twos = bool((power == 2).all()) if isinstance(power, Tensor) else power == 2
    return _square_of(node, z) if twos else None


def _product(node: Any) -> Square | None:
    """z z, z times its conjugate, or z times a multiple of it."""
    edges = node.next_functions
    if edges[0][0] is None or edges[1][0] is None:
        return None
    z, other = plain(node._saved_self), plain(node._saved_other)
    if edges[0] == edges[1]:
        return _square_of(node, z) if _same(z, other) else None
    if _is_repeated(edges, z, other):
        return _square_of(node, z)
    for one, conjugate, factor in ((*edges, z), (*edges[::-1], other)):
        if operator(conjugate[0]) == "Conj" and conjugate[0].next_functions[0] == one:
            return _entries(node, factor)
    return _with_multiple(node, (z, other), summed=False)


def _inner_product(node: Any) -> Square | None:
    """z · z of a vector, the conjugate of z times z, or z · c z."""
    edges = node.next_functions
    if edges[0][0] is None or edges[1][0] is None:
        return None
    z, other = plain(node._saved_self), plain(node._saved_other if operator(node) == "Vdot" else node._saved_tensor)
    same = _base(edges[0]) == _base(edges[1]) and _same(z, other)
    if same or (edges[0] != edges[1] and _is_repeated(edges, z, other)):
        return None if z.is_complex() and operator(node) == "Dot" else _entries(node, z, (1,))
    return _with_multiple(node, (z, other), summed=True) if edges[0] != edges[1] else None


def _matrix_product(node: Any) -> Square | None:
    """The product of a row and the column that it, or a multiple of it, is the transpose of, or of several rows."""
    edges = node.next_functions
    if edges[0][0] is None or edges[1][0] is None:
        return None
    z, other = plain(node._saved_self), plain(node._saved_mat2)
    if z.is_complex() or z.shape[-2] != 1 or other.shape[-1] != 1:
        return None
    if _base(edges[0]) == _base(edges[1]) and _same(z.mT, other):
        return _entries(node, z)
    return _with_multiple(node, (z, other), summed=True) if z.shape[:-2].numel() == 1 else None


def _with_multiple(node: Any, factors: tuple[Tensor, Tensor], summed: bool) -> Square | None:
    """The products of the entries of z and those of c z, with a constant c.

    Args:
        summed: whether the node adds them up: then one may be a row and the other a column or a vector.
    """
    views = _VIEWS if summed else ()
    for z, cz, edge, multiple in ((*factors, *node.next_functions), (*factors[::-1], *node.next_functions[::-1])):
        above, below = _entries_of(edge, z, views), _entries_of(multiple, z, (*views, *_MULTIPLES))
        if cz.is_complex() or z.numel() != cz.numel() or not _alike(above, below, sums=True):
            continue
        (weights,) = later_grad([cz], [GradientEdge(*below)], [torch.ones_like(cz)])
        weights = weights.reshape(z.shape)
        if _alike(above, below) or _equal(cz.detach().reshape(z.shape), weights * z.detach()):
            return Square(node, (z,), shape=(1,) * z.dim() if summed else None, weights=weights)
    return None


def _entries_of(edge: Any, z: Tensor, through: tuple[str, ...]) -> Any:
    """What a tensor is made of entry by entry; through views only where it is a vector, whose order they keep."""
    while operator(edge[0]) in through and (below := _only_factor(edge[0])) is not None:
        shape = tuple(below[0]._input_metadata[below[1]].shape)
        line = math.prod(shape) == z.numel() == max(shape, default=1) and operator(edge[0]) != "AsStrided"
        if not line and (shape != z.shape or operator(edge[0]) in _VIEWS):
            break
        edge = below
    return edge


def _mean_squared_error(node: Any) -> Square:
    z, target = plain(node._saved_self), plain(node._saved_target)
    return Square(node, (z, target), 1 / max(z.numel(), 1) if node._saved_reduction == _MEAN else 1.0)


_FORMS: dict[str, Callable[[Any], Square | None]] = {
    "Pow": _power,
    "Mul": _product,
    "Dot": _inner_product,
    "Vdot": _inner_product,
    "Mm": _matrix_product,
    "Bmm": _matrix_product,
    "MseLoss": _mean_squared_error,
}


def _square_of(node: Any, z: Tensor) -> Square | None:
    """The square of z, which a node makes: where z is a multiple of norms, or of roots, of what is below those."""
    if z.is_complex():
        return None  # no sum of squares of what is real
    (root, index), scale = node.next_functions[0], None
    while operator(root) in _MULTIPLES and (below := _only_factor(root)) is not None:
        root, index = below
    square = _ROOTS.get(operator(root), lambda root: None)(root)
    if square is None:
        return Square(node, (z,))
    if root is not node.next_functions[0][0]:
        (scale,) = later_grad([z], [GradientEdge(root, index)], [torch.ones_like(z)])
        if scale.numel() != z.numel():
            return Square(node, (z,))  # one norm, several multiples
    return replace(square, node=node, scale=scale)


def _only_factor(node: Any) -> tuple[Any, int] | None:
    """Where the one factor of a multiple that is no constant comes from."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    divisor = operator(node) == "Div" and node.next_functions[0][0] is None
    return edges[0] if len(edges) == 1 and not divisor else None


def _norm(root: Any) -> Square | None:
    order = root._saved_ord if hasattr(root, "_saved_ord") else root._saved_p
    if order != 2:
        return None
    z, dims = plain(root._saved_self), getattr(root, "_saved_dim", None)
    along = {_signed(dim) % z.dim() for dim in dims} if dims and z.dim() else set(range(z.dim()))
    return _entries(root, z, tuple(1 if i in along else n for i, n in enumerate(z.shape)))


def _distance(root: Any) -> Square | None:
    z, other = plain(root._saved_self), plain(root._saved_other)
    if root._saved_p != 2 or z.shape != other.shape or z.is_complex() or other.is_complex():
        return None
    return Square(root, (z, other))


def _modulus(root: Any) -> Square:
    z = plain(root._saved_self)
    return _entries(root, z, tuple(z.shape))


def _root(root: Any) -> Square | None:
    """Of a sum of squares."""
    edge = root.next_functions[0]
    half = operator(root) == "Sqrt" or root._saved_exponent == 0.5
    return Square(root, (), beneath=GradientEdge(*edge)) if half and form_of(edge[0]).squares else None


_ROOTS: dict[str, Callable[[Any], Square | None]] = {
    "LinalgVectorNorm": _norm,
    "Norm": _norm,
    "Dist": _distance,
    "Abs": _modulus,
    "Sqrt": _root,
    "Pow": _root,
}


def _entries(node: Any, z: Tensor, shape: tuple[int, ...] | None = None) -> Square:
    """The squares of all entries of z, of complex ones of both parts; ``shape`` is of their sums, expandable to z."""
    if not z.is_complex():
        return Square(node, (z,), shape=shape)
    with torch.enable_grad():
        parts = torch.view_as_real(z.resolve_conj())
    return Square(node, (parts,), shape=(*(z.shape if shape is None else shape), 1))


def _signed(dim: int) -> int:
    """A dimension as autograd notes it, -1 as 2⁶⁴ - 1."""
    return dim - 2**64 if dim >= 2**63 else dim


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same entries of the same memory."""
    a, b = plain(a), plain(b)
    steps = [[step for n, step in zip(t.shape, t.stride(), strict=True) if n != 1] for t in (a, b)]
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and steps[0] == steps[1]


def _base(edge: Any) -> Any:
    """What a tensor is a view of."""
    while operator(edge[0]) in _VIEWS:
        edge = edge[0].next_functions[0]
    return edge


def _alike(a: Any, b: Any, sums: bool = False) -> bool:
    """Whether two edges are of the same tensor, as far as autograd's graph shows it: x[:, 0] and another x[:, 0].

    Args:
        sums: whether they may differ by a constant, as x - y and x - z, whose graphs do not keep y and z.
    """
    if a == b:
        return True
    (one, number), (other, its_number) = a, b
    added = sums and operator(one) in ("Add", "Sub", "Rsub")
    if number != its_number or operator(one) != operator(other) or not (added or operator(one) in _PLAIN):
        return False
    if one.name() != other.name() or _kept(one) != _kept(other):
        return False
    sums = sums and operator(one) != "Abs"  # of x - y and y - x
    return all(_alike(x, y, sums) for x, y in zip(one.next_functions, other.next_functions, strict=True))


def _is_repeated(edges: Any, z: Tensor, other: Tensor) -> bool:
    """Whether two tensors from different edges are the same: of sums, that they have the same entries tells it."""
    return _alike(*edges) or (_alike(edges[0], edges[1], sums=True) and _equal(z, other))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether the entries of two tensors are the same, but for rounding; those that are not numbers, too."""
    with unseen(), _disable_current_modes():
        return a.shape == b.shape and torch.allclose(a, b, 8 * torch.finfo(a.dtype).eps, 0, equal_nan=True)


def _kept(node: Any) -> list[Any]:
    """What a node keeps: shapes, numbers, and of tensors where they lie."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    shapes = [(tuple(of.shape), of.dtype) for of in node._input_metadata]
    return [shapes, *(_shown(getattr(node, name)) for name in names)]


def _shown(a: Any) -> Any:
    if isinstance(a, Tensor):
        a = plain(a)
        return a.data_ptr(), a.shape, a.stride()
    return tuple(map(_shown, a)) if isinstance(a, (list, tuple)) else a
