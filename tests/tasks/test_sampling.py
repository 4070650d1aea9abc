"""Where tasks draw their points."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from imstep.tasks.sampling import boundary, box, face

SIDES = [(0.0, 2.0), (-1.0, 1.0)]
DRAWS = [(box(SIDES), 0, 64, None), (face(SIDES, 1, 0.5), 0, 64, 0.5), (boundary(SIDES, [1]), 0, 32, -1.0)]


@pytest.mark.parametrize(("draw", "axis", "cells", "other"), DRAWS)
def test_draws_are_even_and_follow_from_the_generator(
    draw: Callable[[int, Generator], Tensor], axis: int, cells: int, other: float | None
) -> None:
    generator = Generator().manual_seed(4)
    points, next_points = draw(64, generator), draw(64, generator)
    assert points.dtype is torch.float64
    occupied = (points[:cells, axis] / 2 * cells).floor().sort().values
    assert torch.equal(occupied, torch.arange(cells, dtype=torch.float64))
    if other is not None:
        assert bool((points[:cells, 1] == other).all())
    assert not torch.equal(points, next_points)
    assert torch.equal(points, draw(64, Generator().manual_seed(4)))
