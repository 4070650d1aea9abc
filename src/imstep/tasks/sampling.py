"""Uniformly distributed points of boxes, their faces and their boundary; grids to compare on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

__all__ = ["boundary", "box", "face", "grid", "periodic_pair"]

Draw = Callable[[int, Generator], Tensor]
Sides = Sequence[tuple[float, float]]


def box(sides: Sides) -> Draw:
    """Points of a box, given the least and the largest value of each coordinate."""
    low, high = torch.tensor(sides, dtype=torch.float64).unbind(1)

    def draw(count: int, generator: Generator) -> Tensor:
        return low + (high - low) * torch.rand(count, len(low), generator=generator, dtype=torch.float64)

    return draw


def face(sides: Sides, axis: int, value: float) -> Draw:
    """Points of a box on which the coordinate ``axis`` has a value."""
    inside = box(sides)

    def draw(count: int, generator: Generator) -> Tensor:
        points = inside(count, generator)
        points[:, axis] = value
        return points

    return draw


def boundary(sides: Sides, axes: Sequence[int] | None = None) -> Draw:
    """Points of the faces of a box across the given axes (all if None), as many of each, in order."""
    inside, chosen = box(sides), range(len(sides)) if axes is None else axes
    faces = [(axis, value) for axis in chosen for value in sides[axis]]

    def draw(count: int, generator: Generator) -> Tensor:
        points = inside(count, generator)
        for number, part in enumerate(points.tensor_split(len(faces))):
            axis, value = faces[number]
            part[:, axis] = value
        return points

    return draw


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
