"""Points of boxes, their faces and their boundary, evenly spread and random; grids to compare on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from imstep import pde

__all__ = ["boundary", "box", "face", "grid", "periodic_pair"]

Draw = Callable[[int, Generator], Tensor]
Sides = Sequence[tuple[float, float]]


def box(sides: Sides) -> Draw:
    """Points of a box, given the least and the largest value of each coordinate."""
    return lambda count, generator: pde.sobol_points(sides, count, generator=generator, dtype=torch.float64)


def face(sides: Sides, axis: int, value: float) -> Draw:
    """Points of a box on which the coordinate ``axis`` has a value."""
    return box([(value, value) if number == axis else side for number, side in enumerate(sides)])


def boundary(sides: Sides, axes: Sequence[int] | None = None) -> Draw:
    """Points of the faces of a box across the given axes (all if None), as many of each, in order."""
    return lambda count, generator: pde.boundary_points(
        sides, count, axes=axes, generator=generator, dtype=torch.float64
    )


def periodic_pair(points: Tensor, axis: int, sides: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The points moved to both ends of a coordinate."""
    ends = []
    for value in sides:
        moved = points.clone()
        moved[:, axis] = value
        ends.append(moved)
    return ends[0], ends[1]


def grid(sides: Sides, counts: Sequence[int]) -> Tensor:
    """A grid of a rectangle, the first coordinate fastest: (n, 2), float64."""
    x, y = (torch.linspace(*side, count, dtype=torch.float64) for side, count in zip(sides, counts, strict=True))
    return torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], 1)
