"""Random output gradients whose covariance is the curvature of the loss.

With E[u uᵀ] = L''(z), the vectors Jᵀu have the Gauss-Newton matrix as covariance; from one backward pass with such
a u come the Kronecker factors of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.complexstep import hvp
from imstep.complexstep.islands import plain
from imstep.complexstep.later import later_grad
from imstep.complexstep.loss_split import ConvexLoss


@dataclass(frozen=True)
class Place:
    """Where the rows of an output are in those of a whole: random numbers are drawn for all, and only these are used.

    Attributes:
        before, after: rows of the whole that come before and after.
    """

    before: int = 0
    after: int = 0

    def drawn(self, like: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``draw`` fills the whole with, at the place of ``like``."""
        if not self.before + self.after:
            return draw(torch.empty_like(like))
        whole = draw(like.new_empty(self.before + len(like) + self.after, *like.shape[1:]))
        return whole[self.before : self.before + len(like)]


def sample_output_gradients(
    loss: Tensor, ends: Sequence[ConvexLoss], generator: torch.Generator, places: Sequence[Place] | None = None
) -> list[Tensor]:
    """One random u per convex operator, of the shape of its z.

    Args:
        loss: 0-dim, with its graph; the graph is kept.
        ends: the convex operators that the loss is a positive combination of.
        generator: where the random numbers come from, on the device of ``z``.
        places: of each end's outputs in those of the whole batch; None where they are the whole.

    Source: for softmax, labels sampled from the model's own distribution, as Martens and Grosse, ICML 2015 (arXiv
        1503.05671), section 2.2; for losses that act entry by entry L'' is diagonal and u = sqrt(diag L'') times signs.
    """
    given = zip(ends, end_weights(loss, ends), places or [Place()] * len(ends), strict=True)
    return [_sample(end, weight, generator, place) for end, weight, place in given]


def pulled(ends: Sequence[ConvexLoss], u: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Where output gradients enter autograd's graph, and what enters there: with both sides of an error, u and -u."""
    found = [(z, v if sign > 0 else -v) for end, v in zip(ends, u, strict=True) for _, z, sign in end.sides]
    return [z for z, _ in found], [v for _, v in found]


def end_weights(loss: Tensor, ends: Sequence[ConvexLoss]) -> list[Tensor]:
    """With which weights the values of convex operators enter the loss; the loss's graph is kept."""
    weights = later_grad(loss, [end.result for end in ends])
    return [weight.detach() * end.slope for weight, end in zip(weights, ends, strict=True)]


def _sample(end: ConvexLoss, weight: Tensor, generator: torch.Generator, place: Place) -> Tensor:
    z = plain(end.z).detach()
    if end.func is torch.ops.aten._log_softmax.default:
        return _softmax_sample(z, end.args[1], weight, generator, place)
    if end.func is torch.ops.aten.logsumexp.default:
        return _softmax_sample(z, end.args[1][0], -kept_dimension(end, weight), generator, place)
    if end.func is torch.ops.aten.mul.Tensor:
        diagonal = 2 * weight
    else:
        others = [plain(end.args[at]).detach() for at in end.positions[1:]]
        diagonal = hvp(lambda t: (end.value(t, *others) * weight).sum(), z, torch.ones_like(z))
    signs = place.drawn(z, lambda t: t.bernoulli_(0.5, generator=generator)).mul_(2).sub_(1)
    return diagonal.clamp_(min=0).sqrt_().mul_(signs)


def kept_dimension(end: ConvexLoss, weight: Tensor) -> Tensor:
    """The weight of a logarithm of a sum of exponentials, with the dimension of the sum, of size 1."""
    return weight if len(end.args) > 2 and end.args[2] else weight.unsqueeze(end.args[1][0])


def _softmax_sample(z: Tensor, dim: int, weight: Tensor, generator: torch.Generator, place: Place) -> Tensor:
    scale = (-weight).sum(dim, keepdim=True).clamp_(min=0).sqrt_()
    return (drawn_labels(z, dim, generator, place) * scale).to(z.dtype)


def drawn_labels(z: Tensor, dim: int, generator: torch.Generator, place: Place | None = None) -> Tensor:
    """softmax(z) less one at a class drawn from it, the gradient of a cross-entropy, for every row along ``dim``."""
    p = z.softmax(dim, dtype=torch.promote_types(z.dtype, torch.float32))
    rows = p.movedim(dim, -1)
    # As torch.multinomial draws one label a row, in the same order.
    chances = (place or Place()).drawn(rows.contiguous(), lambda t: t.exponential_(generator=generator))
    labels = (rows / chances).reshape(-1, rows.shape[-1]).argmax(-1, keepdim=True)
    chosen = torch.zeros_like(rows.reshape(-1, rows.shape[-1])).scatter_(1, labels, 1.0)
    return p - chosen.reshape(rows.shape).movedim(-1, dim)
