"""Convection, reaction and waves: equations on which physics-informed networks are known to fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from imstep import pde
from imstep.tasks.models import mlp
from imstep.tasks.physics import Condition, PhysicsTask, Reference
from imstep.tasks.sampling import boundary, box, face, grid, periodic_pair

__all__ = ["TASKS"]

PERIOD = (0.0, 2 * math.pi)
PERIODIC_SIDES = [PERIOD, (0.0, 1.0)]
UNIT = [(0.0, 1.0), (0.0, 1.0)]
GROWTH, OVERTONE = 5.0, 5.0
Solution = Callable[[Tensor], Tensor]


def _moved_sine(speed: float, x: Tensor) -> Tensor:
    return torch.sin(x[:, :1] - speed * x[:, 1:])


def _logistic(x: Tensor) -> Tensor:
    start = torch.exp(-((x[:, :1] - math.pi) ** 2) / (2 * (math.pi / 4) ** 2))
    grown = start * torch.exp(GROWTH * x[:, 1:])
    return grown / (grown + 1 - start)


def _string(x: Tensor) -> Tensor:
    tone = lambda n: torch.sin(n * math.pi * x[:, :1]) * torch.cos(2 * n * math.pi * x[:, 1:])
    return tone(1) + 0.5 * tone(OVERTONE)


def _convection(speed: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda u, x: _along(u, x, (speed, 1.0))


def _along(u: nn.Module, x: Tensor, direction: tuple[float, float]) -> Tensor:
    """(v·∇)u, which takes half the work of both entries of ∇u."""
    return pde.expand(u, x, directions=x.new_tensor([direction])).first[..., 0]


def _reaction(u: nn.Module, x: Tensor) -> Tensor:
    expansion = pde.expand(u, x, directions=x.new_tensor([[0.0, 1.0]]))
    return expansion.first[..., 0] - GROWTH * expansion.value * (1 - expansion.value)


def _wave(u: nn.Module, x: Tensor) -> Tensor:
    return pde.laplacian(u, x, over={0: -4.0, 1: 1.0})


def _rest(u: nn.Module, x: Tensor) -> Tensor:
    """u_t, which is zero at the start."""
    return _along(u, x, (0.0, 1.0))


def _jump(u: nn.Module, x: Tensor) -> Tensor:
    left, right = periodic_pair(x, 0, PERIOD)
    return u(left) - u(right)


def _periodic(
    equation: Callable[[nn.Module, Tensor], Tensor], solution: Solution, counts: tuple[int, int, int]
) -> tuple[Condition, ...]:
    return (
        Condition("equation", equation, box(PERIODIC_SIDES), counts[0]),
        Condition("initial", lambda u, x: u(x) - solution(x), face(PERIODIC_SIDES, 1, 0.0), counts[1]),
        Condition("boundary", _jump, box(PERIODIC_SIDES), counts[2]),
    )


def _reference(solution: Solution, sides: list[tuple[float, float]]) -> Reference:
    points = grid(sides, (201, 101))
    return Reference(points, solution(points), shape=(101, 201))


def _convection_task(name: str, speed: float, counts: tuple[int, int, int], balanced: bool) -> PhysicsTask:
    solution = partial(_moved_sine, speed)
    return PhysicsTask(
        name,
        f"Convection equation, speed {speed:g}",
        f"u_t + {speed:g} u_x = 0, u(x, 0) = sin x, periodic; {counts[0]:,} + {counts[1]} + {counts[2]} points; tanh "
        "MLP 2-50-50-50-50-1. Held out: relative L2 error.",
        partial(mlp, (2, 50, 50, 50, 50, 1)),
        _periodic(_convection(speed), solution, counts),
        partial(_reference, solution, PERIODIC_SIDES),
        balanced=balanced,
    )


TASKS = (
    _convection_task("convection", 30.0, (1000, 128, 100), balanced=False),
    _convection_task("convection-40", 40.0, (4000, 257, 101), balanced=False),
    _convection_task("convection-80", 80.0, (4000, 257, 101), balanced=True),
    PhysicsTask(
        "reaction",
        "Reaction equation",
        "u_t = 5 u (1 - u), u(x, 0) a bell, periodic; 4,000 + 257 + 101 points; tanh MLP 2-50-50-50-1. Held out: "
        "relative L2 error.",
        partial(mlp, (2, 50, 50, 50, 1)),
        _periodic(_reaction, _logistic, (4000, 257, 101)),
        partial(_reference, _logistic, PERIODIC_SIDES),
        first=1090,
        balanced=True,
    ),
    PhysicsTask(
        "wave",
        "Wave equation",
        "u_tt = 4 u_xx, u(x, 0) = sin πx + sin(5πx)/2, u_t(x, 0) = 0, fixed ends; 4,000 + 257 + 257 + 202 points; tanh "
        "MLP 2-50-50-50-1. Held out: relative L2 error.",
        partial(mlp, (2, 50, 50, 50, 1)),
        (
            Condition("equation", _wave, box(UNIT), 4000),
            Condition("initial", lambda u, x: u(x) - _string(x), face(UNIT, 1, 0.0), 257),
            Condition("initial slope", _rest, face(UNIT, 1, 0.0), 257),
            Condition("boundary", lambda u, x: u(x), boundary(UNIT, [0]), 202),
        ),
        partial(_reference, _string, UNIT),
        first=1179,
        balanced=True,
    ),
)
