"""Points where an equation is missed most."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor


def adaptive_points(
    residual: Callable[[Tensor], Tensor],
    candidates: Tensor,
    count: int,
    *,
    power: float = 1.0,
    floor: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """Points drawn more often where residuals are large.

        probability of x  ∝  |ρ(x)|^power / mean of |ρ|^power + floor

    Args:
        residual: of points (k, d), (k,) or (k, m): what is missed there; of m components the norm counts.
        candidates: points to choose from, (k, d); several times ``count``, uniformly distributed.
        count: points wanted, at most k; none twice.
        power: > 0; the larger, the more they gather where residuals are largest.
        floor: >= 0; the larger, the more evenly they lie; 0 draws none where nothing is missed.
        generator: of random numbers; None for PyTorch's own.

    Returns:
        (count, d), without a graph.

    Raises:
        ValueError: a number is out of range; there are fewer candidates; residuals are not finite, or not one a point.

    Cost: residuals of all candidates, without derivatives by parameters.

    Source: Wu, Zhu, Tan, Kartha and Lu, Comput. Methods Appl. Mech. Eng. 403 (2023), 115671 (arXiv 2207.10289), RAD;
        the defaults are theirs.

    Example:
        >>> x = torch.linspace(0, 1, 1000)[:, None]
        >>> points = adaptive_points(lambda x: x > 0.9, x, 100, floor=0.0)
        >>> bool((points > 0.9).all())
        True
    """
    if not (0 < power < math.inf and 0 <= floor < math.inf):
        raise ValueError(f"power is positive and floor at least 0, got {power} and {floor}.")
    if not 1 <= count <= len(candidates):
        raise ValueError(f"count lies between 1 and the number of candidates, {len(candidates)}, got {count}.")
    size, _ = sizes_of(residual, candidates)
    if not bool(size.isfinite().all()):
        raise ValueError("a residual is not finite, so that no points can be drawn by it. Look at the equation there.")
    size = (size / size.max().clamp(min=torch.finfo(size.dtype).tiny)) ** power
    mean = size.mean()
    weights = size / mean + floor if mean > 0 else torch.ones_like(size)
    # Of independent exponential times, divided by weights, the shortest: a draw without replacement of any size.
    times = torch.empty_like(weights).exponential_(generator=generator) / weights
    if int((weights > 0).sum()) < count:
        raise ValueError(f"residuals are zero at all but {int((weights > 0).sum())} candidates. Give a positive floor.")
    return candidates[times.topk(count, largest=False).indices].detach()


def sizes_of(residual: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, int]:
    """What is missed at each point, its norm, (k,), float64, without a graph; and the residuals' dimensions."""
    missed = residual(points).detach()
    if missed.shape[:1] != points.shape[:1]:
        raise ValueError(
            f"residual returned shape {tuple(missed.shape)} for {len(points)} points. Return what is missed at "
            "each of them, (k,) or (k, m), not a mean over all."
        )
    return torch.linalg.vector_norm(missed.reshape(len(points), -1).double(), dim=1), missed.dim()
