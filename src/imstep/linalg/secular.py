"""The trust-region subproblem of a matrix whose eigenvalues are known: one equation in one unknown."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def solve_in_eigenbasis(values: Tensor, coefficients: Tensor, radius: float, rounding: float) -> tuple[Tensor, float]:
    """The y, ‖y‖ <= radius, that maximises cᵀy - Σ θᵢ yᵢ²/2, and its multiplier μ.

        (θᵢ + μ) yᵢ = cᵢ,   μ >= 0,   μ (radius - ‖y‖) = 0,   θ₁ + μ >= 0

    A null direction that c does not point along, both to rounding, gets yᵢ = 0. In the hard case, where c has no part
    along the least eigenvalue and y would end inside for μ = -θ₁, the first coordinate makes up the length.

    Args:
        values: θ in ascending order, (k,), float64 on the CPU.
        coefficients: c, (k,), likewise.
        radius: > 0, finite.
        rounding: relative rounding error of θ and c.

    Source: Moré & Sorensen, SIAM J. Sci. Stat. Comput. 4 (1983), sections 2 and 3. The unknown is σ = μ + θ₁, not
    μ: it keeps its relative accuracy next to the hard case, where μ + θ₁ cancels.
    """
    k = values.numel()
    if k == 0:
        return coefficients, 0.0
    null = (values.abs() <= k * rounding * values.abs().max()) & (
        coefficients.abs() <= k * rounding * coefficients.norm()
    )
    if bool((null | (values > 0)).all()):
        inside = torch.where(null, 0.0, coefficients / values)
        if float(inside.norm()) <= radius:
            return inside, 0.0
    least = float(values[0])
    gaps, floor = values - least, max(least, 0.0)  # floor: of σ, as μ is not negative
    y = _coordinates(gaps, coefficients, floor)
    missing = radius**2 - float(y @ y)
    if missing >= 0:  # the hard case
        y[0] = math.sqrt(missing)
        return y, floor - least
    sigma = _root(gaps, coefficients, radius, floor)
    return _coordinates(gaps, coefficients, sigma), sigma - least


def _coordinates(gaps: Tensor, coefficients: Tensor, sigma: float) -> Tensor:
    return torch.where(coefficients == 0, 0.0, coefficients / (gaps + sigma))


def _root(gaps: Tensor, coefficients: Tensor, radius: float, floor: float) -> float:
    """The σ with ‖c / (gaps + σ)‖ = radius, larger than the floor."""
    seen = coefficients != 0
    gaps, coefficients = gaps[seen], coefficients[seen]
    # Here one term alone is as long as the radius, so the root is not below. As 1/‖y(σ)‖ is concave, Newton's method on
    # it climbs from there to the root without overshooting.
    sigma = max(float((coefficients.abs() / radius - gaps).max()), floor)
    for _ in range(100):
        y = coefficients / (gaps + sigma)
        norm = float(y.norm())
        step = norm**2 / float((y**2 / (gaps + sigma)).sum()) * (norm - radius) / radius
        if not step > 1e-16 * sigma:
            break
        sigma += step
    return sigma
