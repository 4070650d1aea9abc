"""Chord iterations: Gauss-Newton corrections that keep one factorised Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from imstep.linalg import DampedLeastSquares


@dataclass(frozen=True, eq=False)
class ChordStep:
    """What chord iterations came to.

    Attributes:
        coordinates: u of the best iterate, (k,), as the factorised problem has it.
        image: J d for the d of u, (N,).
        decrease: ρ₀ᵀρ₀/2 - ρᵀρ/2; -inf where there is no iterate.
        promise: the decrease for the first iterate if ρ were linear.
        ratio: length of the second correction over that of the first; infinite where residuals were not finite.
        iterations: corrections up to the best iterate.
        evaluations: of residuals.
    """

    coordinates: Tensor
    image: Tensor
    decrease: float
    promise: float
    ratio: float
    iterations: int
    evaluations: int


def chord_iterations(
    reduced: DampedLeastSquares,
    residuals: Tensor,
    shifted: Tensor,
    damping: float,
    residuals_at: Callable[[Tensor], Tensor],
    *,
    limit: float,
    max_iterations: int,
) -> ChordStep:
    """Approach min ‖ρ(w + v + d)‖² + λ‖d‖² with the Jacobian at w.

        u <- u - (FᵀF + λI)⁻¹ (Fᵀρ(w + v + d(u)) + λu)

    Without a shift v the first iterate is the step of Levenberg and Marquardt; the second adds the geodesic
    acceleration, to leading order; further ones take up what curvature of ρ there is along the path. They end when a
    correction is not shorter than ``limit`` times the one before.

    Args:
        reduced: the linearisation at w.
        residuals: ρ₀ at w, (N,).
        shifted: ρ at w + v, (N,): the same where v = 0.
        damping: λ > 0.
        residuals_at: ρ for coordinates u, (N,); not finite where the loss is not.
        limit: < 1.
        max_iterations: >= 1.

    Source: chord iterations, Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), chapter 5; geodesic
        acceleration, Transtrum and Sethna (arXiv 1201.5885); that one leads to the other is our own remark.
    """
    u, current = residuals.new_zeros(reduced.rank), shifted
    best, best_decrease, best_at = u, -math.inf, 0
    evaluations, promise, ratio, length = 0, 0.0, 0.0, math.inf
    for iteration in range(1, max_iterations + 1):
        correction = reduced.solve(current, u, damping)
        last, length = length, reduced.norm(correction)
        if iteration == 1:
            promise = _decrease(residuals, shifted + reduced.image(correction))
        elif iteration == 2:
            ratio = length / last if last > 0 else 0.0
        if not length <= limit * last:
            break
        u = u + correction
        current, evaluations = residuals_at(u), iteration
        decrease = _decrease(residuals, current)
        if not math.isfinite(decrease):
            ratio = math.inf
            break
        if decrease > best_decrease:
            best, best_decrease, best_at = u, decrease, iteration
    return ChordStep(best, reduced.image(best), best_decrease, promise, ratio, best_at, evaluations)


def _decrease(before: Tensor, after: Tensor) -> float:
    """aᵀa/2 - bᵀb/2, as a product of difference and sum: the difference of nearly equal sums would be all rounding."""
    return float((before - after) @ (before + after)) / 2
