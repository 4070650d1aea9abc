"""Trust-region and cubic subproblems of a matrix whose eigenvalues are known: one equation in one unknown."""

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
    if values.numel() == 0:
        return coefficients, 0.0
    null = _null(values, coefficients, rounding)
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


def solve_cubic_in_eigenbasis(
    values: Tensor, coefficients: Tensor, sigma: float, rounding: float
) -> tuple[Tensor, float]:
    """The y that maximises cᵀy - Σ θᵢ yᵢ²/2 - σ‖y‖³/3, and its multiplier μ.

        (θᵢ + μ) yᵢ = cᵢ,   μ = σ‖y‖,   θ₁ + μ >= 0

    Null directions and the hard case are treated as in :func:`solve_in_eigenbasis`.

    Args:
        values: θ in ascending order, (k,), float64 on the CPU.
        coefficients: c, (k,), likewise.
        sigma: σ > 0, finite.
        rounding: relative rounding error of θ and c.

    Source: Cartis, Gould and Toint, Mathematical Programming 127 (2011), 245-295, section 6.1; the bracket is ours.
    """
    if values.numel() == 0:
        return coefficients, 0.0
    coefficients = torch.where(_null(values, coefficients, rounding), 0.0, coefficients)
    # The unknown is the excess of μ over the least that it can be: next to the hard case as next to zero it keeps its
    # relative accuracy.
    least = max(-float(values[0]), 0.0)
    gaps = values + least
    y = _coordinates(gaps, coefficients, 0.0)
    missing = (least / sigma) ** 2 - float(y @ y)
    if missing >= 0:  # the hard case, or nothing to gain
        y[0] += math.sqrt(missing)
        return y, least
    excess = _excess(gaps, coefficients, sigma, least)
    return _coordinates(gaps, coefficients, excess), least + excess


def _null(values: Tensor, coefficients: Tensor, rounding: float) -> Tensor:
    """Where the matrix is zero and c has no part, both to rounding."""
    k = values.numel()
    return (values.abs() <= k * rounding * values.abs().max()) & (
        coefficients.abs() <= k * rounding * coefficients.norm()
    )


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


def _excess(gaps: Tensor, coefficients: Tensor, sigma: float, least: float) -> float:
    """The e > 0 with ‖c / (gaps + e)‖ = (least + e)/σ."""
    seen = coefficients != 0
    gaps, coefficients = gaps[seen], coefficients[seen]
    # ‖y‖ <= ‖c‖/(g + e), with g the least gap, bounds the root from above, by that of (g + e)(least + e) = σ‖c‖.
    middle, difference = (float(gaps[0]) + least) / 2, (float(gaps[0]) - least) / 2
    rest = sigma * float(coefficients.norm()) - float(gaps[0]) * least
    low, high = 0.0, rest / (middle + math.sqrt(difference**2 + sigma * float(coefficients.norm())))
    excess = high
    for _ in range(200):
        y = coefficients / (gaps + excess)
        norm, target = float(y.norm()), (least + excess) / sigma
        low, high = (excess, high) if norm > target else (low, excess)
        # Newton's method on target/‖y‖, which is nearly straight.
        value = target / norm
        slope = 1 / (sigma * norm) + value * float((y**2 / (gaps + excess)).sum()) / norm**2
        following = excess - (value - 1) / slope
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - excess) <= 2e-16 * excess:
            break
        excess = following
    return excess
