"""The heat equation, and the conductivity that measured temperatures tell."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Generator, Tensor, nn

from imstep import pde
from imstep.tasks.models import mlp
from imstep.tasks.physics import Condition, PhysicsTask, Reference
from imstep.tasks.sampling import boundary, box, face, grid

__all__ = ["TASKS", "HeatWithConductivity"]

CONDUCTIVITY = 0.25
SIDES = [(0.0, 1.0), (0.0, 1.0)]
NOISE = 0.01


class HeatWithConductivity(nn.Module):
    """A temperature u(x, t) and the logarithm of a conductivity, both trained.

    Args:
        network: maps points (k, 2) to values (k, 1).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.log_conductivity = nn.Parameter(torch.zeros(()))

    def forward(self, points: Tensor) -> Tensor:
        return self.network(points)


def _solution(x: Tensor) -> Tensor:
    return torch.exp(-CONDUCTIVITY * math.pi**2 * x[:, 1:]) * torch.sin(math.pi * x[:, :1])


def _equation(u: nn.Module, x: Tensor) -> Tensor:
    expansion = pde.expand(u, x, second=[0])
    assert expansion.second is not None
    conductivity = u.log_conductivity.exp() if isinstance(u, HeatWithConductivity) else CONDUCTIVITY
    return expansion.first[..., 1] - conductivity * expansion.second[..., 0]


def _measured(count: int, generator: Generator) -> Tensor:
    """The same places, times and errors whatever the step: they are data."""
    fixed = Generator().manual_seed(1)
    places = box(SIDES)(count, fixed)
    return torch.cat([places, NOISE * torch.randn(count, 1, dtype=torch.float64, generator=fixed)], 1)


def _misfit(u: nn.Module, rows: Tensor) -> Tensor:
    places, errors = rows[:, :2], rows[:, 2:]
    return u(places) - (_solution(places) + errors)


def _reference() -> Reference:
    points = grid(SIDES, (101, 101))
    return Reference(points, _solution(points), relative=False, shape=(101, 101))


_COMMON = (
    Condition("equation", _equation, box(SIDES), 900),
    Condition("boundary", lambda u, x: u(x), boundary(SIDES, [0]), 60),
)

TASKS = (
    PhysicsTask(
        "heat-1d",
        "Heat equation",
        "u_t = u_xx / 4, u(x, 0) = sin πx, u = 0 at both ends; 900 + 60 + 60 points; tanh MLP 2-64-1. Held out: root "
        "mean square error.",
        partial(mlp, (2, 64, 1)),
        (*_COMMON, Condition("initial", lambda u, x: u(x) - _solution(x), face(SIDES, 1, 0.0), 60)),
        _reference,
        first=255,
    ),
    PhysicsTask(
        "heat-inverse",
        "Heat equation, conductivity unknown",
        "u_t = k u_xx with k to be found from 200 temperatures with an error of 0.01 each; tanh MLP 2-64-1 and log k. "
        "Held out: root mean square error.",
        lambda: HeatWithConductivity(mlp((2, 64, 1))),
        (*_COMMON, Condition("data", _misfit, _measured, 200)),
        _reference,
    ),
)
