"""The residuals of a loss that is a sum of squares, read off autograd's graph.

    f(w) = 1/2 Σ ρ_i(w)²,   ρ_i = sqrt(2 c_i) z_i   for a loss Σ c_i z_i²

Walk back from the loss through linear operators; the first squares on the way are those of z. What the loss passes back
to a square is its factor c. Nothing is recorded, so that residuals cost a forward pass wherever they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from imstep.complexstep.islands import plain, unseen
from imstep.complexstep.later import later_grad

_LINEAR = (
    *("Add", "Sub", "Neg", "Sum", "Mean", "Mul", "Div", "Stack", "Cat", "View", "UnsafeView", "ReshapeAlias"),
    *("Squeeze", "Unsqueeze", "Expand", "Select", "Slice", "Index", "Permute", "T", "Transpose", "Clone", "ToCopy"),
    *("Alias", "Split", "Unbind", "Where", "MaskedFill"),
)
"""Autograd nodes, by the name of their operator, that are linear in each of their differentiable arguments."""

_BILINEAR = ("Mul", "Div")
_ADDING = ("Add", "Sub", "Stack", "Cat", "Where")
"""Those that join arguments, of which one may be a constant for autograd."""

_MEAN = 1  # how autograd's graph notes the reduction of a mean squared error


class NoResidualsError(ValueError):
    """The loss is no sum of squares, or its residuals depend on each other."""


@dataclass(frozen=True, eq=False)
class Output:
    """A tensor z of the model that residuals are made of: ρ_i = ... + factor_i z_i + ...

    Attributes:
        z: with its graph, any shape.
        factor: of the shape of z.
        start: the residual that the first entry of z belongs to; the others follow in row-major order.
    """

    z: Tensor
    factor: Tensor
    start: int


@dataclass(eq=False)
class Residuals:
    """The residuals ρ of a loss f = ρᵀρ/2, up to a constant, at one point.

    Attributes:
        values: ρ, (N,), detached.
        outputs: what they are made of.
        sizes: how many of them each square of the loss has, in order.
        whole: ρ, and where the loss adds constants to squares, as a last entry what it is more than ρᵀρ/2.
        passes: backward passes made so far.
    """

    values: Tensor
    outputs: tuple[Output, ...]
    sizes: tuple[int, ...]
    whole: Tensor
    passes: int = 0

    def pull_back(self, cotangent: Tensor, inputs: Sequence[Tensor | GradientEdge]) -> tuple[Tensor | None, ...]:
        """The gradient of uᵀρ with respect to ``inputs``, for a constant u (N,); the graph is kept."""
        self.passes += 1
        with unseen():
            parts = [cotangent[o.start : o.start + o.z.numel()].view(o.z.shape) * o.factor for o in self.outputs]
        outputs = [o.z for o in self.outputs]
        return later_grad(outputs, inputs, parts, whole=True)

    def pull_back_block(
        self, cotangents: Tensor, inputs: Sequence[Tensor | GradientEdge]
    ) -> tuple[Tensor | None, ...]:
        """As :meth:`pull_back` for a block (k, N) at once, by vmap; gradients have k as their first dimension."""
        self.passes += len(cotangents)
        pieces = [cotangents[:, o.start : o.start + o.z.numel()].unflatten(1, (*o.z.shape, 1)) for o in self.outputs]
        parts = [piece.squeeze(-1) * o.factor for piece, o in zip(pieces, self.outputs, strict=True)]
        outputs = [o.z for o in self.outputs]
        return torch.autograd.grad(
            outputs, inputs, parts, retain_graph=True, allow_unused=True, is_grads_batched=True  # type: ignore[arg-type]
        )


@dataclass(frozen=True, eq=False)
class _Square:
    """A node whose result is a square, or a sum or mean of squares.

    Attributes:
        node: of autograd's graph.
        parts: the tensor that is squared, or two whose difference is.
        share: factor of each square in the result: 1, or 1/n for a mean.
    """

    node: Any
    parts: tuple[Tensor, ...]
    share: float


def residuals_of(loss: Tensor) -> Residuals | None:
    """The residuals of a loss; None where it is no positive combination of squares.

    Args:
        loss: 0-dim, with its graph, which is kept.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> residuals_of(3 * (w ** 2).sum() + torch.nn.functional.mse_loss(w, torch.zeros(2))).values
        tensor([2.4495, 4.8990, 1.0000, 2.0000])
    """
    squares, constants = _squares(loss.grad_fn)
    if not squares:
        return None
    factors = _factors(loss, squares)
    values: list[Tensor] = []
    outputs: list[Output] = []
    start = 0
    with torch.no_grad(), unseen():
        if bool(torch.stack([(passed < 0).any() for passed in factors]).any()):
            return None
        for square, passed in zip(squares, factors, strict=True):
            z = square.parts[0] - square.parts[1] if len(square.parts) > 1 else square.parts[0].detach()
            scale = (2 * square.share * passed).sqrt().expand(z.shape)
            values.append((scale * z).reshape(-1))
            signed = zip(square.parts, (scale, -scale), strict=False)
            outputs += [Output(part, factor, start) for part, factor in signed if part.requires_grad]
            start += z.numel()
        joined = torch.cat(values)
        rest = [(loss.detach() - joined.square().sum() / 2).reshape(1)] if constants else []
        whole = torch.cat([joined, *rest]) if rest else joined
        return Residuals(joined, tuple(outputs), tuple(map(len, values)), whole)


def require_residuals(loss: Tensor) -> Residuals:
    """The residuals of a loss.

    Raises:
        NoResidualsError: the loss is no sum of squares, or has no graph that shows it.
    """
    residuals = None if loss.grad_fn is None else residuals_of(loss)
    if residuals is None:
        raise NoResidualsError(_why_none(loss))
    return residuals


def _why_none(loss: Tensor) -> str:
    """What is in the way of residuals, and what to do."""
    if loss.is_inference() or torch.is_inference_mode_enabled():
        return (
            "the loss was computed under torch.inference_mode(), which keeps no graph, so its residuals and their "
            "derivatives cannot be found. Take the step, and make the tensors that the closure uses, outside of it."
        )
    if loss.grad_fn is None:
        return (
            "closure returned a loss without a graph (grad_fn is None); its residuals are found in it. "
            "Return the loss itself, not loss.item() or loss.detach(), and do not compute it under no_grad."
        )
    names = {_operator(node) for node in _nodes(loss.grad_fn)}
    if "CompiledFunction" in names:
        return (
            "the loss is computed inside a compiled function (torch.compile), whose graph hides the squares. "
            "Compile the model alone, and compute residuals and loss outside of it."
        )
    return (
        "the loss is not recognised as a sum of squares, so it has no residuals. Build it from squares and mean "
        "squared errors by sums, means and positive factors, detach() factors that another optimizer trains, as "
        "self-adaptive weights are, or use an optimizer that needs no residuals."
    )


def _factors(loss: Tensor, squares: Sequence[_Square]) -> Sequence[Tensor]:
    """What the loss passes back to each square; through another square, which may be of its result, nothing."""
    stop = lambda passed, _: tuple(g if g is None else torch.zeros_like(g) for g in passed)
    hooks = [square.node.register_hook(stop) for square in squares]
    try:
        return later_grad(loss, [GradientEdge(square.node, 0) for square in squares])
    finally:
        for hook in hooks:
            hook.remove()


def _nodes(root: Any) -> set[Any]:
    """The nodes of a graph."""
    seen: set[Any] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return seen


def _squares(root: Any) -> tuple[list[_Square], bool]:
    """The squares that a node is a linear combination of, empty if it has another form; whether it adds constants."""
    found: list[_Square] = []
    seen, waiting, constants = set(), [root], False
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        name = _operator(node)
        square = _SQUARES.get(name, lambda node: None)(node)
        if square is not None:
            found.append(square)
            continue
        parents = [parent for parent, _ in node.next_functions if parent is not None] if node is not None else []
        if name not in _LINEAR or not parents or (name in _BILINEAR and len(parents) > 1):
            return [], False
        if name == "Div" and node.next_functions[0][0] is None:
            return [], False
        constants |= name == "MaskedFill" or (name in _ADDING and len(parents) < len(node.next_functions))
        waiting += reversed(parents)
    return found, constants


def _operator(node: Any) -> str:
    """The operator that a node belongs to: Mul for MulBackward0."""
    return "" if node is None else node.name().partition("Backward")[0]


def _power(node: Any) -> _Square | None:
    (base, _), *exponent = node.next_functions
    if base is None or any(edge is not None for edge, _ in exponent):
        return None  # a power of what is trained, though it be 2 now
    if _operator(base) == "LinalgVectorNorm":
        return None  # the square of a norm is many residuals, of which this would see one
    z, power = plain(node._saved_self), node._saved_exponent
    if isinstance(power, Tensor) and torch.broadcast_shapes(z.shape, power.shape) != z.shape:
        return None  # each entry of z is several residuals
    twos = bool((power == 2).all()) if isinstance(power, Tensor) else power == 2
    return _Square(node, (z,), 1.0) if twos else None


def _product_with_itself(node: Any) -> _Square | None:
    first, second = node.next_functions
    if first[0] is None or first != second or not _same(node._saved_self, node._saved_other):
        return None
    return _Square(node, (plain(node._saved_self),), 1.0)


def _mean_squared_error(node: Any) -> _Square:
    z, target = plain(node._saved_self), plain(node._saved_target)
    share = 1 / z.numel() if node._saved_reduction == _MEAN else 1.0
    return _Square(node, (z, target), share)


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = plain(a), plain(b)
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


_SQUARES: dict[str, Callable[[Any], _Square | None]] = {
    "Pow": _power,
    "Mul": _product_with_itself,
    "MseLoss": _mean_squared_error,
}
