"""Random output gradients whose covariance is the curvature of the loss.

With E[u uᵀ] = L''(z), the vectors Jᵀu have the Gauss-Newton matrix as covariance; from one backward pass with such
a u come the Kronecker factors of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.complexstep import hvp
from imstep.complexstep.gauss_newton import ConvexLoss
from imstep.complexstep.islands import plain
from imstep.complexstep.later import later_grad
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised


def sample_output_gradients(loss: Tensor, ends: Sequence[ConvexLoss], generator: torch.Generator) -> list[Tensor]:
    """One random u per convex operator, of the shape of its z.

    Args:
        loss: 0-dim, with its graph; the graph is kept.
        ends: the convex operators that the loss is a positive combination of.
        generator: where the random numbers come from, on the device of ``z``.

    Source: for softmax, labels sampled from the model's own distribution, as Martens and Grosse, ICML 2015 (arXiv
        1503.05671), section 2.2; for losses that act entry by entry L'' is diagonal and u = sqrt(diag L'') times signs.
    """
    return [_sample(end, weight, generator) for end, weight in zip(ends, end_weights(loss, ends), strict=True)]


def end_weights(loss: Tensor, ends: Sequence[ConvexLoss]) -> list[Tensor]:
    """With which weights the results of convex operators enter the loss; the loss's graph is kept."""
    weights = later_grad(loss, [end.result for end in ends])
    return [weight.detach() for weight in weights]


def _sample(end: ConvexLoss, weight: Tensor, generator: torch.Generator) -> Tensor:
    z = plain(end.z).detach()
    if end.func is torch.ops.aten._log_softmax.default:
        return _softmax_sample(z, end.args[1], weight, generator)
    if end.func is torch.ops.aten.mul.Tensor:
        diagonal = 2 * weight
    else:
        others = [plain(end.args[at]).detach() for at in end.positions[1:]]
        diagonal = hvp(lambda t: (end.value(t, *others) * weight).sum(), z, torch.ones_like(z))
    signs = torch.empty_like(z).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    return diagonal.clamp_(min=0).sqrt_().mul_(signs)


def _softmax_sample(z: Tensor, dim: int, weight: Tensor, generator: torch.Generator) -> Tensor:
    p = z.softmax(dim, dtype=torch.promote_types(z.dtype, torch.float32))
    rows = p.movedim(dim, -1)
    labels = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator)
    chosen = torch.zeros_like(rows.reshape(-1, rows.shape[-1])).scatter_(1, labels, 1.0)
    chosen = chosen.reshape(rows.shape).movedim(-1, dim)
    scale = (-weight).sum(dim, keepdim=True).clamp_(min=0).sqrt_()
    return ((p - chosen) * scale).to(z.dtype)


def sampled_diagonal(point: Linearised, parameters: ParameterVector, generator: torch.Generator) -> Tensor:
    """(Jᵀu)², (n,), whose expectation is the diagonal of the Gauss-Newton matrix at a convex point with its graph.

    Cost: a backward pass.

    Source: Liu et al., arXiv 2305.14342, Algorithm 2, for cross-entropies: there it is B ĝ² with the gradient ĝ of the
        mean over B sampled labels.
    """
    total = parameters.get().zero_()
    for weight, at, _ in point.evaluations(None):
        assert at.split is not None
        ends = at.split.losses
        u = sample_output_gradients(at.loss, ends, generator)
        gradients = later_grad([end.z for end in ends], list(parameters.tensors), u, keep=at.keeps_graph)
        total += weight * parameters.flatten(gradients).square()
    return total
