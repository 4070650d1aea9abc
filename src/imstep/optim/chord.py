"""Chord iterations: Gauss-Newton corrections that keep one factorised Jacobian, with Anderson's acceleration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg import DampedLeastSquares

_RANK = 1e-12
"""Of the largest eigenvalue of a normal matrix of corrections: what rounding leaves of the others."""

FIXED_NUMBER = (
    "the loss has {} residuals where the step begins and {} at a trial point, and {}. Keep their number, by zeros in "
    "place of those that do not count: torch.where(mask, r, 0.0) for r[mask]."
)
"""What is said where residuals of trials have to be those of the start."""


def no_relief(coordinates: Tensor) -> float:
    """Where the minimum is of the residuals alone."""
    return 0.0


@dataclass(frozen=True, eq=False)
class ChordStep:
    """What chord iterations came to.

    Attributes:
        coordinates: u of the best iterate, (k,), as the factorised problem has it.
        image: J d for the d of u, (N,).
        length: ‖d‖.
        decrease: of ρᵀρ/2, and of what is minimised besides; -inf where there is no iterate.
        promise: the decrease for the first iterate if ρ were linear.
        ratio: length of the second correction over that of the first; infinite where residuals were not finite.
        iterations: corrections up to the best iterate.
        evaluations: of residuals.
    """

    coordinates: Tensor
    image: Tensor
    length: float
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
    relief: Callable[[Tensor], float] = no_relief,
    limit: float,
    max_iterations: int,
    most: int,
    enough: float,
    rounding: float = 0.0,
) -> ChordStep:
    """Approach min ‖ρ(w + v + d)‖² + λ‖d‖² with the Jacobian at w.

        c(u) = -(FᵀF + λI)⁻¹ (Fᵀρ(w + v + d(u)) + λu)
        u <- Σ α_j (u_j + c(u_j)) over all u so far, Σ α_j = 1, where ‖Σ α_j c(u_j)‖ is least

    Without a shift v the first iterate is the step of Levenberg and Marquardt. The second correction is the geodesic
    acceleration, to leading order; Anderson's combination of it and the first takes that as far as the two say, and
    further ones take up what curvature of ρ there is along the path. They end when a correction is not shorter than
    ``limit`` times the one before.

    Args:
        reduced: the linearisation at w.
        residuals: ρ₀ at w, (N,).
        shifted: ρ at w + v, (N,): the same where v = 0.
        damping: λ > 0.
        residuals_at: ρ for coordinates u, (N,); not finite where the loss is not. Where they are more or fewer, as of
            a loss of violated constraints alone, an iterate is judged by them and no further correction made.
        relief: by how much u lowers what the minimum is of besides ρᵀρ/2.
        limit: < 1.
        max_iterations: >= 1; of steps that come to too little up to ``most``.
        enough: the decrease that ends these, as a fraction of the promise.
        rounding: of a decrease: of iterates whose decreases differ by less the later one is better.

    Source: chord iterations, Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), chapter 5; geodesic
        acceleration, Transtrum and Sethna (arXiv 1201.5885), that one leads to the other is our own remark; Anderson
        (J. ACM 12, 1965, p. 547), in the form of Walker and Ni (SIAM J. Numer. Anal. 49, 2011, p. 1715).
    """
    u, current = residuals.new_zeros(reduced.rank), shifted
    best, best_decrease, best_at = u, -math.inf, 0
    evaluations, promise, ratio, length = 0, 0.0, 0.0, math.inf
    points: list[Tensor] = []
    corrections: list[Tensor] = []
    for iteration in range(1, most + 1):
        if iteration > max_iterations and best_decrease >= enough * promise - rounding:
            break
        correction = reduced.solve(current, u, damping)
        last, length = length, reduced.norm(correction)
        if iteration == 1:
            promise = decrease_of(residuals, shifted + reduced.image(correction)) + relief(correction)
        elif iteration == 2:
            ratio = length / last if last > 0 else 0.0
        if not length <= limit * last:
            break
        points.append(u)
        corrections.append(correction)
        u = reduced.project(_combined(reduced, points, corrections))
        current, evaluations = residuals_at(u), iteration
        decrease = decrease_of(residuals, current) + relief(u)
        if not math.isfinite(decrease):
            ratio = math.inf
            break
        if decrease >= best_decrease - rounding:
            best, best_decrease, best_at = u, decrease, iteration
        if len(current) != len(residuals):  # others than those that were linearised
            break
    return ChordStep(best, reduced.image(best), reduced.norm(best), best_decrease, promise, ratio, best_at, evaluations)


def _combined(reduced: DampedLeastSquares, points: Sequence[Tensor], corrections: Sequence[Tensor]) -> Tensor:
    """Σ α_j (u_j + c_j) with Σ α_j = 1 and Σ α_j c_j as short as it can be."""
    u, c = points[-1], corrections[-1]
    if len(points) == 1:
        return u + c
    moves = torch.stack([other - u for other in points[:-1]], 1)
    changes = torch.stack([other - c for other in corrections[:-1]], 1)
    normal, slope = reduced.inner(changes, changes), reduced.inner(changes, c[:, None])
    return u + c - ((moves + changes) @ (torch.linalg.pinv(normal, rtol=_RANK, hermitian=True) @ slope))[:, 0]


def decrease_of(before: Tensor, after: Tensor) -> float:
    """aᵀa/2 - bᵀb/2, as a product of difference and sum: the difference of nearly equal sums would be all rounding."""
    if len(before) != len(after):
        return float(before @ before - after @ after) / 2
    return float((before - after) @ (before + after)) / 2
