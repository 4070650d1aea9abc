"""The residuals of a loss that is a sum of squares, read off autograd's graph.

    f(w) = 1/2 Σ ρ_i(w)²,   ρ_i = sqrt(2 c_i) z_i   for a loss Σ c_i z_i²

Walk back from the loss through linear operators; the first squares on the way are those of z. What the loss passes back
to a square is its factor c. Nothing is recorded, so that residuals cost a forward pass wherever they are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from imstep.complexstep.graph import leads_to, walk
from imstep.complexstep.islands import unseen
from imstep.complexstep.later import later_grad
from imstep.curvature.sameness import operator
from imstep.curvature.square_forms import Square, form_of, is_monotone


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

    def pull_back(
        self, cotangent: Tensor, inputs: Sequence[Tensor | GradientEdge], steered: bool = True
    ) -> tuple[Tensor | None, ...]:
        """The gradient of uᵀρ with respect to ``inputs``, for a constant u (N,); the graph is kept.

        Args:
            steered: see :func:`~imstep.complexstep.later.later_grad`.
        """
        self.passes += 1
        with unseen():
            parts = [cotangent[o.start : o.start + o.z.numel()].view(o.z.shape) * o.factor for o in self.outputs]
        outputs = [o.z for o in self.outputs]
        return later_grad(outputs, inputs, parts, whole=True, steered=steered)

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


def residuals_of(loss: Tensor, parameters: Sequence[Tensor] | None = None) -> Residuals | None:
    """The residuals of a loss; None where it is no positive combination of squares.

    Args:
        loss: 0-dim, with its graph, which is kept.
        parameters: see :func:`~imstep.curvature.square_forms.form_of`.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> residuals_of(3 * (w ** 2).sum() + torch.nn.functional.mse_loss(w, torch.zeros(2))).values
        tensor([2.4495, 4.8990, 1.0000, 2.0000])
    """
    weighed, constants = _weighed(loss, loss.grad_fn, parameters)
    if not weighed:
        return None
    values: list[Tensor] = []
    outputs: list[Output] = []
    start = 0
    with torch.no_grad(), unseen():
        if bool(torch.stack([(factor < 0).any() for _, factor in weighed]).any()):
            return None
        for square, factor in weighed:
            z = square.parts[0] - square.parts[1] if len(square.parts) > 1 else square.parts[0].detach()
            scale = (2 * square.share * factor).sqrt().expand(z.shape)
            values.append((scale * z).reshape(-1))
            signed = zip(square.parts, (scale, -scale), strict=False)
            outputs += [Output(part, factor, start) for part, factor in signed if part.requires_grad]
            start += z.numel()
        joined = torch.cat(values)
        rest = [(loss.detach() - joined.square().sum() / 2).reshape(1)] if constants else []
        whole = torch.cat([joined, *rest]) if rest else joined
        return Residuals(joined, tuple(outputs), tuple(map(len, values)), whole)


def require_residuals(loss: Tensor, parameters: Sequence[Tensor] | None = None) -> Residuals:
    """The residuals of a loss as a function of the parameters.

    Raises:
        NoResidualsError: the loss is no sum of squares, or has no graph that shows it.
    """
    residuals = None if loss.grad_fn is None else residuals_of(loss, parameters)
    if residuals is None:
        raise NoResidualsError(_why_none(loss, parameters))
    return residuals


def _why_none(loss: Tensor, parameters: Sequence[Tensor] | None) -> str:
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
    if parameters is not None and not leads_to(loss.grad_fn, parameters):
        return (
            "the loss depends on none of the parameters. Check that the closure evaluates the model whose parameters "
            "were given."
        )
    names = {operator(node) for node in walk([loss.grad_fn])}
    if "CompiledFunction" in names:
        return (
            "the loss is computed inside a compiled function (torch.compile), whose graph hides the squares. "
            "Compile the model alone, and compute residuals and loss outside of it."
        )
    if is_monotone(loss.grad_fn, parameters):
        return (
            "the loss is the root or the logarithm of what may be a sum of squares. Return the sum of squares itself, "
            "such as ((u - y) ** 2).mean() in place of its root: both have the same minima."
        )
    obstacle = form_of(loss.grad_fn, parameters).obstacle
    where = f"at {obstacle}" if obstacle else "a factor is negative"
    if obstacle.startswith(("Dot", "Mv", "Mm", "Bmm")):
        return (
            f"the loss is not recognised as a sum of squares ({where}), so it has no residuals. If it is a quadratic "
            "form r @ A @ r, return (L.T @ r).square().sum() with L = torch.linalg.cholesky(A); else build it from "
            "squares and mean squared errors by sums, means and positive factors."
        )
    if obstacle.startswith(("Mul", "Div")):
        return (
            f"the loss is not recognised as a sum of squares ({where}): both factors depend on the parameters, and are "
            "not the same. If one is the weight of a term, such as exp(-s) in exp(-s) * mse + s, leave s out of the "
            "parameters given here and step it by an optimizer of its own: it is a constant of these steps then. Else "
            "use an optimizer that needs no residuals, such as NewtonKrylov."
        )
    return (
        f"the loss is not recognised as a sum of squares ({where}), so it has no residuals. Build it from squares and "
        "mean squared errors by sums, means and positive factors: a multiplier, c * v + k / 2 * v**2, as "
        "k / 2 * (v + c / k)**2, a term that is positive as the square of its root. For another loss, such as an "
        "energy (deep Ritz), use an optimizer that needs no residuals, such as NewtonKrylov."
    )


def _weighed(
    result: Tensor | GradientEdge, root: Any, parameters: Sequence[Tensor] | None, cotangent: Tensor | None = None
) -> tuple[list[tuple[Square, Tensor]], bool]:
    """The squares that a result is a sum of, each with its factor; whether constants are added to them.

    Args:
        result: of a node ``root``.
        cotangent: of the result; None where it is a scalar.
    """
    form = form_of(root, parameters)
    found, constants = [], form.constants
    for square, passed in zip(form.squares, _factors(result, form.squares, cotangent), strict=True):
        factor = square.factor(passed)
        if square.beneath is None:
            found.append((square, factor))
        else:
            inner, more = _weighed(square.beneath, square.beneath.node, parameters, factor)
            found, constants = found + inner, constants or more
    return found, constants


def _factors(
    result: Tensor | GradientEdge, squares: Sequence[Square], cotangent: Tensor | None
) -> Sequence[Tensor]:
    """What a result passes back to each square; through another square, which may be of its result, nothing."""
    if not squares:
        return ()
    stop = lambda passed, _: tuple(g if g is None else torch.zeros_like(g) for g in passed)
    hooks = [square.node.register_hook(stop) for square in squares]
    try:
        edges = [GradientEdge(square.node, 0) for square in squares]
        return later_grad([result], edges, None if cotangent is None else [cotangent])
    finally:
        for hook in hooks:
            hook.remove()
