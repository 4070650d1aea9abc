"""How far the gradient of a batch is uncertain, from how far its halves disagree."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imstep.complexstep.later import later_grad
from imstep.curvature.direct import of_parameters
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised


def gradient_variance(point: Linearised, parameters: ParameterVector) -> float:
    """The variance of a batch's gradient, that is the trace of its covariance, estimated from two halves.

    With g₁, g₂ the mean gradients of the examples of even and odd number, a and b of them,

        E ab ‖g₁ - g₂‖² / n² = σ² / n,   n = a + b,

    σ² being the trace of the covariance of a single example's gradient. g₁ - g₂ is one backward pass, with the loss's
    gradient at the outputs weighted by example. What is of no examples, such as weight decay, is without variance.
    Pieces of a batch are independent: their variances add up. A piece of one example, which has no halves, counts with
    the mean variance of the others.

    Args:
        point: with the graph of its loss, which is kept.
        parameters: the vector that the gradient is of.

    Returns:
        σ²/n >= 0; nan where there are no two examples.

    Raises:
        ValueError: the loss has no convex end, so that nothing is known of its examples.

    Cost: a backward pass; for a batch in pieces, an evaluation of each as well.

    Source: the variance that Byrd, Chin, Nocedal and Wu, Math. Program. 134 (2012), 127-155, section 3, take from a
        gradient for each example; to take it from two halves is our own choice. Examples are numbered along the first
        dimension of what the loss is computed from.
    """
    if parameters.processes is None:
        total, measured, whole = _totals(point, parameters)
    else:
        found = lambda: _totals(point, parameters.evaluated)
        of_this = lambda: torch.tensor(found(), dtype=parameters.dtype, device=parameters.device)
        total, measured, whole = parameters.processes.sum(of_this, 3, parameters).tolist()
    return total * whole / measured if measured else math.nan


def _totals(point: Linearised, parameters: ParameterVector) -> tuple[float, float, float]:
    """The variance of what this process evaluates and can measure; how much that counts, and how much all counts."""
    total = measured = whole = 0.0
    for weight, at, _ in point.evaluations(None):
        variance = _variance(at, parameters)
        whole += weight
        if not math.isnan(variance):
            total, measured = total + weight**2 * variance, measured + weight
        del at  # before the next evaluation takes its place
    return total, measured, whole


def _variance(point: Linearisation, parameters: ParameterVector) -> float:
    """The variance of the gradient of one evaluation."""
    if point.split is None:
        raise ValueError(
            "the gradient's variance compares the halves of a batch, but this loss is not recognised as a convex "
            "function of outputs, one for each example. Use a loss made of squares, cross entropies or Huber terms, "
            "or leave it out (variance_every=0)."
        )
    arguments = [end.args[at] for end in point.split.losses for at in end.positions]
    outputs = list({id(z): z for z in arguments if not of_parameters(z) and z.ndim > 0 and len(z) > 1}.values())
    if not outputs:
        return math.nan
    contrasts = [_contrast(g) for g in _gradients_at(outputs, point.loss)]
    parts = later_grad(outputs, parameters.tensors, contrasts)
    return float(parameters.flatten(list(parts)).square().sum(dtype=torch.float64))


def _gradients_at(outputs: list[Tensor], loss: Tensor) -> list[Tensor]:
    """The loss's gradient at each output, the others held fixed: an output may be computed from another one."""
    found = [torch.zeros_like(z) for z in outputs]

    def stop(at: int, gradient: Tensor) -> Tensor:
        found[at] = gradient.detach()
        return torch.zeros_like(gradient)

    hooks = [z.register_hook(lambda g, at=at: stop(at, g)) for at, z in enumerate(outputs)]
    try:
        later_grad(loss, outputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _contrast(gradient: Tensor) -> Tensor:
    """The examples' gradients, weighted so that their sum is sqrt(ab)/n times the difference of the halves' means."""
    odd = len(gradient) // 2
    even = len(gradient) - odd
    weights = gradient.new_full((len(gradient),), math.sqrt(odd / even))
    weights[1::2] = -math.sqrt(even / odd)
    return gradient * weights.reshape(-1, *[1] * (gradient.ndim - 1))
