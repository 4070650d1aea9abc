"""A physics-informed network for the convection equation, u_t + 30 u_x = 0 with u(x, 0) = sin x, periodic in x."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from imstep.tasks.examples import Batch
from imstep.tasks.models import mlp

__all__ = ["Convection", "convection_model", "convection_points", "sobol", "uniform"]

SPEED = 30.0
PERIOD = 2 * math.pi
INTERIOR, INITIAL, BOUNDARY, SOLUTION = range(4)
COUNTS = {INTERIOR: 2000, INITIAL: 128, BOUNDARY: 100}
GRID = (100, 50)


class Convection(nn.Module):
    """What a network u(x, t) misses, row by row, weighted.

    Args:
        network: maps points (k, 2) to values (k, 1).

    Inputs are (k, 4): the kind of row, its weight, x in [0, 2π], t in [0, 1]. Outputs are (k, 1): the weight times

        u_t + 30 u_x,   u - sin x,   u(0, t) - u(2π, t),   u - sin(x - 30 t)

    for the kinds 0 to 3.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: Tensor) -> Tensor:
        misses = {INTERIOR: self._equation, INITIAL: self._solution, BOUNDARY: self._jump, SOLUTION: self._solution}
        places = {kind: (rows[:, 0] == kind).nonzero()[:, 0] for kind in misses}
        present = [kind for kind, place in places.items() if len(place) > 0]
        missed = torch.cat([misses[kind](rows[places[kind], 2:]) for kind in present])
        order = torch.cat([places[kind] for kind in present]).argsort()
        return rows[:, 1:2] * missed[order]

    def _equation(self, points: Tensor) -> Tensor:
        trained = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(self.network(points).sum(), points, create_graph=trained)
        return slopes[:, 1:] + SPEED * slopes[:, :1]

    def _solution(self, points: Tensor) -> Tensor:
        return self.network(points) - torch.sin(points[:, :1] - SPEED * points[:, 1:])

    def _jump(self, points: Tensor) -> Tensor:
        left = torch.cat([torch.zeros_like(points[:, :1]), points[:, 1:]], 1)
        return self.network(left) - self.network(left + points.new_tensor([PERIOD, 0.0]))


def convection_model() -> Convection:
    """For u a tanh network 2-50-50-50-50-1."""
    return Convection(mlp((2, 50, 50, 50, 50, 1)))


def sobol(count: int, seed: int) -> Tensor:
    """Scrambled Sobol points of the unit square, (count, 2)."""
    return SobolEngine(2, scramble=True, seed=seed).draw(count)


def uniform(count: int, seed: int) -> Tensor:
    """Independent, uniformly distributed points of the unit square, (count, 2)."""
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))


def convection_points(
    data: Path | None, draw: Callable[[int, int], Tensor] = sobol
) -> tuple[Batch, Batch]:
    """Points weighted so that the mean square over all rows is the sum of the three kinds' mean squares.

    Held out is the solution on a grid, weighted so that the mean square is the square of the relative L2 error.
    """
    total = sum(COUNTS.values())
    parts = []
    for kind, count in COUNTS.items():
        points = draw(count, kind) * torch.tensor([PERIOD, 1.0])
        if kind == INITIAL:
            points[:, 1] = 0
        parts.append(_rows(kind, math.sqrt(total / count), points))
    train = torch.cat(parts)[torch.randperm(total, generator=torch.Generator().manual_seed(0))]
    x, t = torch.arange(GRID[0]) * (PERIOD / GRID[0]), torch.linspace(0, 1, GRID[1])
    heldout = _rows(SOLUTION, math.sqrt(2), torch.cartesian_prod(x, t))  # 1 over the root mean square of a sine
    return _aimed(train), _aimed(heldout)


def _rows(kind: int, weight: float, points: Tensor) -> Tensor:
    return torch.cat([points.new_tensor([kind, weight]).expand(len(points), 2), points], 1)


def _aimed(rows: Tensor) -> Batch:
    """Rows whose misses are to be zero."""
    return Batch(rows, torch.zeros(len(rows), 1))
