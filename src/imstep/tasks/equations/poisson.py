"""Poisson's equation in 2, 5 and 10 dimensions, with the settings of the literature on natural gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from imstep import pde
from imstep.tasks.models import mlp
from imstep.tasks.physics import Condition, PhysicsTask, Reference
from imstep.tasks.sampling import boundary, box, grid

__all__ = ["TASKS"]

TEST_POINTS = 10_000


def _waves(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1, keepdim=True)


def _cosines(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x).sum(1, keepdim=True)


def _harmonic(x: Tensor) -> Tensor:
    return (x[:, ::2] * x[:, 1::2]).sum(1, keepdim=True)


def _conditions(
    solution: Callable[[Tensor], Tensor], eigenvalue: float, dimension: int, inside: int, edge: int
) -> tuple[Condition, Condition]:
    """-Δu = eigenvalue · solution in the unit cube, u = solution at its boundary."""
    sides = [(0.0, 1.0)] * dimension

    def equation(u: nn.Module, x: Tensor) -> Tensor:
        return pde.laplacian(u, x) + eigenvalue * solution(x)

    return (
        Condition("equation", equation, box(sides), inside),
        Condition("boundary", lambda u, x: u(x) - solution(x), boundary(sides), edge),
    )


def _on_grid() -> Reference:
    points = grid([(0, 1), (0, 1)], (101, 101))
    return Reference(points, _waves(points), relative=False, shape=(101, 101), axes=((0, "x"), (1, "y")))


def _at_random(solution: Callable[[Tensor], Tensor], dimension: int, relative: bool) -> Reference:
    points = torch.rand(TEST_POINTS, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Reference(points, solution(points), relative)


TASKS = (
    PhysicsTask(
        "poisson-2d",
        "Poisson's equation in the square",
        "-Δu = 2π² sin πx sin πy, u = 0 at the edge; 900 + 120 points; tanh MLP 2-64-1. Held out: root mean square "
        "error.",
        partial(mlp, (2, 64, 1)),
        _conditions(_waves, 2 * math.pi**2, 2, 900, 120),
        _on_grid,
    ),
    PhysicsTask(
        "poisson-5d",
        "Poisson's equation in 5 dimensions",
        "-Δu = π² Σ cos πx_i, u = Σ cos πx_i; 3,000 + 500 points; tanh MLP 5-64-1. Held out: root mean square error.",
        partial(mlp, (5, 64, 1)),
        _conditions(_cosines, math.pi**2, 5, 3000, 500),
        partial(_at_random, _cosines, 5, False),
        first=875,
    ),
    PhysicsTask(
        "poisson-5d-wide",
        "Poisson's equation in 5 dimensions, a larger network",
        "As poisson-5d; tanh MLP 5-64-64-48-48-1.",
        partial(mlp, (5, 64, 64, 48, 48, 1)),
        _conditions(_cosines, math.pi**2, 5, 3000, 500),
        partial(_at_random, _cosines, 5, False),
        first=875,
    ),
    PhysicsTask(
        "poisson-10d",
        "A harmonic function of 10 variables",
        "Δu = 0, u = x₁x₂ + x₃x₄ + ...; 100 + 50 points; tanh MLP 10-256-256-128-128-1. Held out: relative L2 error.",
        partial(mlp, (10, 256, 256, 128, 128, 1)),
        _conditions(_harmonic, 0.0, 10, 100, 50),
        partial(_at_random, _harmonic, 10, True),
        last=2400,
    ),
)
