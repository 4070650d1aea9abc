"""Where to go: a direction of descent with what is known of the loss along it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imstep.linalg import KrylovResult, KrylovStatus, LinearOperator, smallest_eigenpair
from imstep.linalg.dots import dots, norm_in_range
from imstep.optim.record import Cost

LANCZOS_STEPS = 32

_SLANT = 1e-10
"""Of ‖g‖‖d‖: a slope that is less is rounding."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction d of descent.

    Attributes:
        vector: d, (n,).
        image: A d, undamped, (n,).
        slope: gᵀd.
        curvature: dᵀAd, undamped.
        norm: ‖d‖.
        status: why the solver that found it ended.
        iterations: of the solver.
        cost: what finding it cost besides products with A.
        pairs: directions p with their products A p that were met on the way, as far as they were asked for.
        earlier: iterates x of the solver before d with their products A x, oldest first, as far as they were asked for.
    """

    vector: Tensor
    image: Tensor
    slope: float
    curvature: float
    norm: float
    status: KrylovStatus
    iterations: int
    cost: Cost = field(default_factory=Cost)
    pairs: tuple[tuple[Tensor, Tensor], ...] = ()
    earlier: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def along(cls, vector: Tensor, matrix: Tensor, gradient: Tensor, dtype: torch.dtype) -> Direction:
        """A vector, with its product by A as a matrix."""
        image = matrix @ vector
        numbers = _along(gradient, vector, image)
        return cls(vector.to(dtype), image.to(dtype), *numbers, KrylovStatus.CONVERGED, 0)

    def moved(self, vector: Tensor, image: Tensor, gradient: Tensor) -> Direction:
        """Another vector with its product in its place."""
        slope, curvature, norm = _along(gradient, vector, image)
        return replace(self, vector=vector, image=image, slope=slope, curvature=curvature, norm=norm, earlier=())

    def times(self, factor: float) -> Direction:
        """The direction, longer by a factor >= 0; itself if that is 1."""
        if factor == 1:
            return self
        return replace(
            self,
            vector=factor * self.vector,
            image=factor * self.image,
            slope=factor * self.slope,
            curvature=factor * (factor * self.curvature),
            norm=factor * self.norm,
        )

    def descends(self, gradient: Tensor) -> bool:
        """Whether s < 0, measurably: s <= -1e-10 ‖g‖‖d‖."""
        return 0 < self.norm < math.inf and self.slope <= -_SLANT * norm_in_range(gradient) * self.norm


def descent(operator: LinearOperator, gradient: Tensor, result: KrylovResult) -> Direction:
    """The solution that a solver has found; or, where rounding has left no descent, -τg, τ = gᵀg / |gᵀAg|.

    No descent is s > -1e-10 ‖g‖‖d‖, or numbers that are not finite. -g costs a product more; alone it has the length of
    a gradient, in other units than a step.
    """
    vector, image = result.solution, result.image
    numbers = _along(gradient, vector, image)
    told = result.status, result.iterations
    found = Direction(vector, image, *numbers, *told, pairs=result.pairs, earlier=result.iterates)
    if found.descends(gradient) and math.isfinite(found.curvature):
        return found
    return downhill(found, operator, -gradient, gradient)


def downhill(found: Direction, operator: LinearOperator, vector: Tensor, gradient: Tensor) -> Direction:
    """In place of another direction τv, τ = -gᵀv / |vᵀAv|, for a vector v (n,) along which the loss falls."""
    found = found.moved(vector, operator @ vector, gradient)
    # Nothing is known of the curvature where it is not finite; the trials will tell.
    found = found if math.isfinite(found.curvature) else replace(found, curvature=0.0)
    factor = -found.slope / abs(found.curvature) if found.curvature else 1.0
    return found.times(factor) if 0 < factor * found.norm <= torch.finfo(vector.dtype).max else found


def combined(
    gradient: Tensor, direction: Direction, other: Tensor, other_image: Tensor, damping: float
) -> Direction:
    """The minimiser of the damped model over all α d + β e, e being ``other``; d itself where that is no better known.

        [dᵀBd  dᵀBe] [α]     [gᵀd]
        [eᵀBd  eᵀBe] [β] = - [gᵀe],   B = A + λI

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), section 7.
    """
    d, e = direction.vector, other
    Ad, Ae = direction.image, other_image
    dd, de, ee, d2, de2, e2, ge = dots((d, Ad), (e, Ad), (e, Ae), (d, d), (d, e), (e, e), (gradient, e))
    dd, de, ee = dd + damping * d2, de + damping * de2, ee + damping * e2
    gd = direction.slope
    determinant = dd * ee - de * de
    # Nearly parallel vectors, and indefinite forms, leave the pair of factors to rounding.
    if not (math.isfinite(determinant + ge) and dd > 0 and ee > 0 and determinant > 1e-4 * dd * ee):
        return direction
    alpha, beta = (de * ge - ee * gd) / determinant, (de * gd - dd * ge) / determinant
    vector = torch.add(alpha * d, e, alpha=beta)
    image = torch.add(alpha * Ad, Ae, alpha=beta)
    both = direction.moved(vector, image, gradient)
    usable = both.slope < 0 and 0 < both.norm < math.inf and math.isfinite(both.curvature)
    return both if usable else direction


@dataclass(frozen=True, eq=False)
class Escape:
    """A way out of a stationary point.

    Attributes:
        direction: a unit direction of negative curvature, pointing downhill.
        largest: the largest curvature, or that along |x|, xᵀ|H|x / xᵀx, in magnitude, as far as it is known.
    """

    direction: Direction
    largest: float

    @classmethod
    def along(cls, vector: Tensor, image: Tensor, gradient: Tensor, largest: float, dtype: torch.dtype) -> Escape:
        """Along ± ``vector``, of any length, with its product."""
        slope, curvature, norm = _along(gradient, vector, image)
        sign = -1.0 if slope > 0 else 1.0
        unit, image = (v.to(dtype) * (sign / norm) for v in (vector, image))
        status = KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
        return cls(Direction(unit, image, -abs(slope) / norm, curvature / norm**2, 1.0, status, 0), largest)


def escape_direction(operator: LinearOperator, gradient: Tensor, seed: int) -> Escape | None:
    """A way out of a stationary point along negative curvature; None if none was found.

    Cost: up to 32 products of Lanczos' method from a random start.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), section 7.1, on directions of negative curvature.
    """
    generator = torch.Generator(device=operator.device).manual_seed(seed)
    pair = smallest_eigenpair(operator, generator=generator, steps=min(LANCZOS_STEPS, operator.size))
    if not pair.value < 0:
        return None
    # A negative value within the pair's own error, or rounding of the largest, is no proof.
    rounding = 1e3 * torch.finfo(operator.dtype).eps * pair.magnitude
    if -pair.value <= max(10 * pair.residual_norm**2 / pair.magnitude, rounding):
        return None
    return Escape.along(pair.vector, pair.value * pair.vector, gradient, pair.magnitude, operator.dtype)


def _along(gradient: Tensor, vector: Tensor, image: Tensor) -> tuple[float, float, float]:
    """gᵀd, dᵀAd and ‖d‖."""
    slope, squared, curvature = dots((gradient, vector), (vector, vector), (vector, image))
    return slope, curvature, math.sqrt(squared) if squared >= 0 else math.nan
