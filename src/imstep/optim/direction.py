"""Where to go: a direction of descent with what is known of the loss along it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg import (
    KrylovStatus,
    LinearOperator,
    StoppingRule,
    conjugate_gradient,
    smallest_eigenpair,
)

LANCZOS_STEPS = 32


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction d of descent.

    Attributes:
        vector: d, (n,).
        slope: gᵀd.
        curvature: dᵀAd, undamped.
        norm: ‖d‖.
        status: why the Krylov iteration that found it ended.
        iterations: of that iteration.
    """

    vector: Tensor
    slope: float
    curvature: float
    norm: float
    status: KrylovStatus
    iterations: int


def krylov_direction(
    operator: LinearOperator,
    gradient: Tensor,
    *,
    damping: float,
    preconditioner: LinearOperator | None,
    stopping: Sequence[StoppingRule],
    curvature_floor: float,
) -> Direction:
    """The truncated solution of (A + λI) d = -g, or the first direction itself where it disturbs already.

    Falls back to -g where rounding has left no descent: s > -1e-10 ‖g‖‖d‖, or numbers that are not finite.
    """
    result = conjugate_gradient(
        operator,
        -gradient,
        damping=damping,
        preconditioner=preconditioner,
        stopping=stopping,
        curvature_floor=curvature_floor,
    )
    vector, curvature = result.solution, result.curvature
    if result.iterations == 0 and result.disturbing_direction is not None:
        vector, curvature = result.disturbing_direction, result.disturbing_curvature or 0.0
    slope, norm = float(gradient @ vector), float(vector.norm())
    descends = 0 < norm < math.inf and slope <= -1e-10 * float(gradient.norm()) * norm
    if not descends or not math.isfinite(curvature):
        vector = -gradient
        slope, norm = -float(gradient @ gradient), float(gradient.norm())
        curvature = float(vector @ (operator @ vector))
        # Nothing is known of the curvature then; the trials will tell.
        curvature = curvature if math.isfinite(curvature) else 0.0
    return Direction(vector, slope, curvature, norm, result.status, result.iterations)


def escape_direction(operator: LinearOperator, gradient: Tensor, seed: int) -> Direction | None:
    """A unit direction of negative curvature at a stationary point, pointing downhill; None if there is none.

    Cost: up to 32 products of Lanczos' method from a random start.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), section 7.1, on directions of negative curvature.
    """
    generator = torch.Generator(device=operator.device).manual_seed(seed)
    pair = smallest_eigenpair(operator, generator=generator, steps=min(LANCZOS_STEPS, operator.size))
    # A negative value within the pair's own error is no proof.
    if not pair.value < -max(10 * pair.residual_norm**2, 1e3 * torch.finfo(operator.dtype).eps):
        return None
    slope = float(gradient @ pair.vector)
    vector = -pair.vector if slope > 0 else pair.vector
    return Direction(
        vector,
        -abs(slope),
        float(pair.value),
        float(vector.norm()),
        KrylovStatus.DISTURBING_NEGATIVE_CURVATURE,
        0,
    )
