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

from imstep.complexstep.islands import plain, unseen
from imstep.complexstep.later import later_grad
from imstep.curvature.live import Live, Reach
from imstep.curvature.sameness import BILINEAR, VIEWS, is_alike, is_conjugate, is_equal, is_same, operator

LINEAR = (
    *("Add", "Sub", "Neg", "Sum", "Mean", "Mul", "Div", "Stack", "Cat", "View", "UnsafeView", "ReshapeAlias"),
    *("Squeeze", "Unsqueeze", "Expand", "Select", "Slice", "Index", "Permute", "T", "Transpose", "Clone", "ToCopy"),
    *("Alias", "Split", "Unbind", "Where", "MaskedFill", "ViewAsReal", "Dot", "Mv", "Mm", "Bmm", "Trace", "Diagonal"),
    *("Cumsum", "IndexSelect", "Gather", "MaskedSelect", "IndexAdd", "ScatterAdd", "Flip", "Roll", "Repeat", "Unfold"),
    *("Nansum", "Sort", "Topk", "AvgPool2D", "AvgPool3D", "ConstantPadNd", "Tril", "Triu"),
)
"""Autograd nodes, by the name of their operator, that are linear in each of their differentiable arguments. Others are
asked for what they pass back: where that depends on no parameter, they are linear, if only piece by piece."""

_MULTIPLES = ("Mul", "Div", "Neg")
_OF_ONE = ("Add", "Mul", "Div", "View", "Clone", "ToCopy", "Squeeze", "Select")  # linear, entry by entry, mostly rising
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
            gradients: weights that another optimizer trains, functions of points that are differentiated by, a zero
            that a sum begins with. None: all that does.
    """
    return _form(Live(root, None if parameters is None else Reach(parameters)))


def _form(root: Live) -> Form:
    found: dict[Live, Square] = {}
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
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if not parents:
            return Form((), obstacle="a parameter")
        divides = name == "Div" and node.next_functions[0][0] is None
        if divides or (name in BILINEAR and len(parents) > 1) or not (name in LINEAR or node.is_linear()):
            return Form((), obstacle=node.name())
        if name == "Mul":
            within = _form(parents[0])
            if not within.squares and not _by_zero(node):  # as 0 * p.sum(), so that each parameter has a gradient
                return within
            found.update({Live(square.node, None): square for square in within.squares})
            constants |= within.constants
            continue
        adds = name in _ADDING and len(parents) < len(node.next_functions)
        constants |= adds or name == "MaskedFill" or name not in LINEAR
        waiting += reversed(parents)
    return Form(tuple(found.values()), constants)


def _by_zero(node: Live) -> bool:
    """Whether a product is that of one differentiable factor and of zeros, which nothing trains."""
    edges = node.node.next_functions
    if None not in [parent for parent, _ in edges]:
        return False
    factor = node._saved_other if edges[0][0] is not None else node._saved_self
    with unseen(), _disable_current_modes():  # to which a number that a node keeps is no tensor
        return factor is not None and not bool(plain(factor).any())


def is_monotone(root: Any, parameters: Sequence[Tensor] | None = None) -> bool:
    """Whether a node is, but for constants, a function of one sum of squares, if it is one, that has its minima."""
    root = Live(root, None if parameters is None else Reach(parameters))
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
    powers = power.unique().tolist() if isinstance(power, Tensor) else [power]
    if len(powers) != 1 or powers[0] not in (2, 4, 6, 8):
        return None
    if powers[0] == 2:
        return _square_of(node, z)
    with torch.enable_grad():
        return None if z.is_complex() else Square(node.node, (z ** (powers[0] / 2),))


def _product(node: Any) -> Square | None:
    """z z, z times its conjugate, or z times a multiple of it."""
    edges = node.next_functions
    if not _are_two(edges):
        return None
    z, other = plain(node._saved_self), plain(node._saved_other)
    if is_conjugate(edges, z, other):
        return _entries(node, z)
    return _square_of(node, z) if is_same(edges, z, other) else _with_multiple(node, (z, other), summed=False)


def _inner_product(node: Any) -> Square | None:
    """z · z of a vector, the conjugate of z times z, or z · c z."""
    edges, name = node.next_functions, operator(node)
    if not _are_two(edges):
        return None
    z, other = plain(node._saved_self), plain(node._saved_other if name == "Vdot" else node._saved_tensor)
    if (is_conjugate if z.is_complex() and name == "Dot" else is_same)(edges, z, other):
        return _entries(node, z, (1,))
    return _with_multiple(node, (z, other), summed=True)


def _matrix_product(node: Any) -> Square | None:
    """The product of a row and the column that it, or a multiple of it, is the transpose of, or of several rows."""
    edges = node.next_functions
    if not _are_two(edges):
        return None
    z, other = plain(node._saved_self), plain(node._saved_mat2)
    if z.shape[-2] != 1 or other.shape[-1] != 1:
        return None
    if _is_transpose(edges, z, other):
        return _entries(node, z, (*z.shape[:-1], 1))
    return _with_multiple(node, (z, other), summed=True) if z.shape[:-2].numel() == 1 else None


def _trace(node: Any) -> Square | None:
    """Of a matrix times its transpose: the sum of its squares; or the diagonal, the sums of the squares of rows."""
    product, _ = node.next_functions[0]
    if operator(product) != "Mm" or not _are_two(product.next_functions):
        return None
    z, other = plain(product._saved_self), plain(product._saved_mat2)
    aside = operator(node) == "Diagonal" and node._saved_offset != 0
    if aside or not _is_transpose(product.next_functions, z, other):
        return None
    return _entries(node, z, (len(z), 1) if operator(node) == "Diagonal" else (1, 1))


def _are_two(edges: Any) -> bool:
    """Whether both factors depend on parameters."""
    return len(edges) > 1 and all(below is not None for below, _ in edges)


def _is_transpose(edges: Any, z: Tensor, other: Tensor) -> bool:
    """Whether the second of two matrices is the transpose of the first, of complex ones the conjugate transpose."""
    return (is_conjugate if z.is_complex() else is_same)(edges, z.mT, other)


def _with_multiple(node: Any, factors: tuple[Tensor, Tensor], summed: bool) -> Square | None:
    """The products of the entries of z and those of c z, with a constant c.

    Args:
        summed: whether the node adds them up: then one may be a row and the other a column or a vector.
    """
    views = VIEWS if summed else ()
    for z, cz, edge, multiple in ((*factors, *node.next_functions), (*factors[::-1], *node.next_functions[::-1])):
        above, below = _entries_of(edge, z, views), _entries_of(multiple, z, (*views, *_MULTIPLES))
        if cz.is_complex() or z.numel() != cz.numel() or not is_alike(above, below):
            continue
        weights = _passed(cz, below).reshape(z.shape)
        if above == below or is_equal(cz.reshape(z.shape), weights * z.detach()):
            return Square(node.node, (z,), shape=(1,) * z.dim() if summed else None, weights=weights)
    return None


def _entries_of(edge: Any, z: Tensor, through: tuple[str, ...]) -> Any:
    """What a tensor is made of entry by entry; through views only where it is a vector, whose order they keep."""
    while operator(edge[0]) in through and (below := _only_factor(edge[0])) is not None:
        shape = tuple(below[0]._input_metadata[below[1]].shape)
        line = math.prod(shape) == z.numel() == max(shape, default=1) and operator(edge[0]) != "AsStrided"
        if not line and (shape != z.shape or operator(edge[0]) in VIEWS):
            break
        edge = below
    return edge


def _mean_squared_error(node: Any) -> Square:
    z, target = plain(node._saved_self), plain(node._saved_target)
    return Square(node.node, (z, target), 1 / max(z.numel(), 1) if node._saved_reduction == _MEAN else 1.0)


def _variance(node: Any) -> Square:
    """Of all entries, or along some dimensions; also as the square of standard deviations."""
    z, correction = plain(node._saved_self), node._saved_correction
    along = _along(z, node._saved_dim)
    count = math.prod(z.shape[dim] for dim in along) - (1 if correction is None else correction)
    with torch.enable_grad():
        apart = z - z.mean(along, keepdim=True)
    square = _entries(node, apart, tuple(1 if i in along else n for i, n in enumerate(z.shape)))
    return replace(square, share=1 / count if count > 0 else math.nan)


_FORMS: dict[str, Callable[[Any], Square | None]] = {
    "Pow": _power,
    "Mul": _product,
    "Dot": _inner_product,
    "Vdot": _inner_product,
    "Mm": _matrix_product,
    "Bmm": _matrix_product,
    "MseLoss": _mean_squared_error,
    "Var": _variance,
    "Trace": _trace,
    "Diagonal": _trace,
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
        return Square(node.node, (z,))
    if root is not node.next_functions[0][0]:
        scale = _passed(z, (root, index))
        if scale.numel() != z.numel():
            return Square(node.node, (z,))  # one norm, several multiples
    return replace(square, node=node.node, scale=scale)


def _only_factor(node: Any) -> tuple[Any, int] | None:
    """Where the one factor of a multiple that is no constant comes from."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    divisor = operator(node) == "Div" and node.next_functions[0][0] is None
    return edges[0] if len(edges) == 1 and not divisor else None


def _norm(root: Any) -> Square | None:
    order = root._saved_ord if hasattr(root, "_saved_ord") else root._saved_p
    if order != 2:
        return None
    z = plain(root._saved_self)
    along = _along(z, getattr(root, "_saved_dim", None))
    return _entries(root, z, tuple(1 if i in along else n for i, n in enumerate(z.shape)))


def _along(z: Tensor, dims: Any) -> tuple[int, ...]:
    """The dimensions that autograd notes, -1 as 2⁶⁴ - 1; all, where it notes none."""
    signed = [dim - 2**64 if dim >= 2**63 else dim for dim in dims or ()]
    return tuple(dim % z.dim() for dim in signed) if signed and z.dim() else tuple(range(z.dim()))


def _distance(root: Any) -> Square | None:
    z, other = plain(root._saved_self), plain(root._saved_other)
    if root._saved_p != 2 or z.shape != other.shape or z.is_complex() or other.is_complex():
        return None
    return Square(root.node, (z, other))


def _distances(root: Any) -> Square | None:
    """Of all pairs of rows."""
    if root._saved_p != 2:
        return None
    with torch.enable_grad():
        x, y = plain(root._saved_x1)[..., :, None, :], plain(root._saved_x2)[..., None, :, :]
        parts = tuple(torch.broadcast_tensors(x, y))
    return Square(root.node, parts, shape=(*parts[0].shape[:-1], 1))


def _hypotenuse(root: Any) -> Square:
    with torch.enable_grad():
        z = torch.stack(torch.broadcast_tensors(plain(root._saved_self), plain(root._saved_other)), -1)
    return Square(root.node, (z,), shape=(*z.shape[:-1], 1))


def _modulus(root: Any) -> Square:
    z = plain(root._saved_self)
    return _entries(root, z, tuple(z.shape))


def _root(root: Any) -> Square | None:
    """Of a sum of squares."""
    edge = root.next_functions[0]
    half = operator(root) == "Sqrt" or root._saved_exponent == 0.5
    beneath = GradientEdge(edge[0].node, edge[1])
    return Square(root.node, (), beneath=beneath) if half and _form(edge[0]).squares else None


_ROOTS: dict[str, Callable[[Any], Square | None]] = {
    "LinalgVectorNorm": _norm,
    "Norm": _norm,
    "Std": _variance,
    "Hypot": _hypotenuse,
    "Dist": _distance,
    "Cdist": _distances,
    "Abs": _modulus,
    "Sqrt": _root,
    "Pow": _root,
}


def _entries(node: Any, z: Tensor, shape: tuple[int, ...] | None = None) -> Square:
    """The squares of all entries of z, of complex ones of both parts; ``shape`` is of their sums, expandable to z."""
    if not z.is_complex():
        return Square(node.node, (z,), shape=shape)
    with torch.enable_grad():
        parts = torch.view_as_real(z.resolve_conj())
    return Square(node.node, (parts,), shape=(*(z.shape if shape is None else shape), 1))


def _passed(z: Tensor, below: tuple[Live, int]) -> Tensor:
    """What ones for z pass back to an edge below it."""
    node, number = below
    (passed,) = later_grad([z], [GradientEdge(node.node, number)], [torch.ones_like(z)])
    return passed
