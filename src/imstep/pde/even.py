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
        (count, d), without a graph, in random order. Coordinates are multiples of 2^-30 of their side.

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
        unit = SobolEngine(len(free), scramble=True, seed=seed).draw(count, dtype=torch.float64).cpu()
        # In the sequence's order every other point is in the same half, so that points[::2] would be on one side.
        points[:, free] += (high - low)[free] * unit[torch.randperm(count, generator=generator, device="cpu")]
    return points.to(device or torch.get_default_device(), dtype or torch.get_default_dtype())


def boundary_points(
    sides: Sequence[tuple[float, float]],
    count: int,
    *,
    axes: Sequence[int] | None = None,
    generator: Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """:func:`sobol_points` of the faces of a box, as many of each, or one more, face by face.

    Args:
        sides: the least and the largest value of each coordinate.
        count: points wanted, on all faces together, >= 0.
        axes: coordinates whose two faces are meant, as ``[0]`` of x and t for the ends of x at all times; None for all.
        generator, dtype, device: as there.

    Returns:
        (count, d), without a graph: the faces where the first of the coordinates is least, where it is largest, and
        so on.

    Raises:
        ValueError: sides are no box, or infinite; there is no such coordinate; count is negative.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = boundary_points([(0.0, 1.0), (0.0, 2.0)], 8)
        >>> x[:4, 0].tolist(), x[4:, 1].tolist()
        ([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0])
    """
    low, high = bounds_of(sides)
    chosen = range(len(low)) if axes is None else axes
    if not all(0 <= axis < len(low) for axis in chosen) or len(chosen) == 0:
        raise ValueError(f"axes are coordinates, 0 to {len(low) - 1}, at least one, got {axes}.")
    if count < 0:
        raise ValueError(f"count, the points wanted, is at least 0, got {count}.")
    ends = [(axis, end) for axis in chosen for end in (float(low[axis]), float(high[axis]))]
    whole = list(zip(low.tolist(), high.tolist(), strict=True))
    faces = [[*whole[:axis], (end, end), *whole[axis + 1 :]] for axis, end in ends]
    least, more = divmod(count, len(faces))
    parts = [
        sobol_points(face, least + (number < more), generator=generator, dtype=dtype, device=device)
        for number, face in enumerate(faces)
    ]
    return torch.cat(parts)


def bounds_of(sides: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """The corners of a box, (d,) twice, float64."""
    bounds = torch.as_tensor(sides, dtype=torch.float64, device="cpu")
    if bounds.dim() != 2 or bounds.shape[1] != 2 or not bool((bounds[:, 0] <= bounds[:, 1]).all()):
        raise ValueError(f"sides are the least and the largest value of each coordinate, got {sides!r}.")
    low, high = bounds.unbind(1)
    if not bool((high - low).isfinite().all()):
        raise ValueError(f"sides have to be finite, got {sides!r}.")
    return low, high
