"""Points that lie evenly, and elsewhere in every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.quasirandom import SobolEngine


def sobol_points(
    sides: Sequence[tuple[float, float]],
    count: int,
    *,
    generator: Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random points of a box that leave no gaps: Sobol's sequence, scrambled anew in each call.

    Each point by itself is uniformly distributed, so that a mean over them is that over the box, on average; together
    they are spread more evenly than independent ones. A mean over N of these has an error of about N^(-1/2), one over
    Sobol points of a smooth function in few dimensions of about N^(-3/2). So fewer points do in each step, and a step
    that fits them fits the others.

    Args:
        sides: the least and the largest value of each coordinate; the same twice for a face.
        count: points wanted, >= 0; powers of 2 lie most evenly.
        generator: of random numbers, on the CPU; None for PyTorch's own.
        dtype, device: of the points; None for PyTorch's defaults. All devices have the same points.

    Returns:
        (count, d), without a graph. Coordinates are multiples of 2^-30 of their side.

    Raises:
        ValueError: sides are no box, or infinite; count is negative.

    Source: Sobol', USSR Comput. Math. Math. Phys. 7 (1967), 86-112; scrambled as in Matoušek, J. Complexity 14 (1998),
        527-556, by PyTorch; the rate for scrambled nets: Owen, Ann. Statist. 25 (1997), 1541-1562.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = sobol_points([(0.0, 2.0), (-1.0, -1.0)], 64)
        >>> bool(x[:, 0].sort().values.diff().max() < 4 / 64)  # independent ones have gaps of some 10 / 64
        True
        >>> bool((x[:, 1] == -1).all())
        True
    """
    low, high = bounds_of(sides)
    if count < 0:
        raise ValueError(f"count, the points wanted, is at least 0, got {count}.")
    free = (high > low).nonzero()[:, 0]
    points = low.repeat(count, 1)
    if count > 0 and len(free) > 0:
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        unit = SobolEngine(len(free), scramble=True, seed=seed).draw(count, dtype=torch.float64)
        points[:, free] += (high - low)[free] * unit.cpu()
    return points.to(device or torch.get_default_device(), dtype or torch.get_default_dtype())


def bounds_of(sides: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """The corners of a box, (d,) twice, float64."""
    bounds = torch.as_tensor(sides, dtype=torch.float64, device="cpu")
    if bounds.dim() != 2 or bounds.shape[1] != 2 or not bool((bounds[:, 0] <= bounds[:, 1]).all()):
        raise ValueError(f"sides are the least and the largest value of each coordinate, got {sides!r}.")
    low, high = bounds.unbind(1)
    if not bool((high - low).isfinite().all()):
        raise ValueError(f"sides have to be finite, got {sides!r}.")
    return low, high
