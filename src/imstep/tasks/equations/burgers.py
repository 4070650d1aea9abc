"""Burgers' equation, with the solution of Cole and Hopf; points lie closer where it is steep."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from imstep import pde
from imstep.tasks.models import Periodic, mlp
from imstep.tasks.physics import Condition, PhysicsTask, Reference
from imstep.tasks.sampling import boundary, box, face, grid

__all__ = ["TASKS", "burgers_solution"]

SIDES = [(-1.0, 1.0), (0.0, 1.0)]


def burgers_solution(points: Tensor, viscosity: float) -> Tensor:
    """u with u_t + u u_x = ν u_xx, u(x, 0) = -sin πx, at points (x, t), (k, 2): (k, 1).

        u = -∫ sin(πy) f(y) e^(-η²) dη / ∫ f(y) e^(-η²) dη,   y = x - sqrt(4νt) η,   f(y) = exp(-cos(πy) / (2πν))

    By the trapezoidal rule, which converges exponentially here, on |η| <= 12: for small ν the mass lies far from 0.

    Source: Cole, Quart. Appl. Math. 9 (1951), p. 225; Basdevant et al., Comput. Fluids 14 (1986), p. 23.
    """
    eta = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    values = []
    for part in points.split(2000):
        y = part[:, :1] - (4 * viscosity * part[:, 1:]).sqrt() * eta
        exponent = -torch.cos(math.pi * y) / (2 * math.pi * viscosity) - eta.square()
        density = torch.exp(exponent - exponent.amax(1, keepdim=True))
        values.append(-(torch.sin(math.pi * y) * density).sum(1, keepdim=True) / density.sum(1, keepdim=True))
    return torch.cat(values)


def _equation(viscosity: float) -> Callable[[nn.Module, Tensor], Tensor]:
    def equation(u: nn.Module, x: Tensor) -> Tensor:
        expansion = pde.expand(u, x, second=[0])
        assert expansion.second is not None
        slope, rate = expansion.first.unbind(-1)
        return rate + expansion.value * slope - viscosity * expansion.second[..., 0]

    return equation


def _initial(u: nn.Module, x: Tensor) -> Tensor:
    return u(x) + torch.sin(math.pi * x[:, :1])


@lru_cache
def _reference(viscosity: float) -> Reference:
    points = grid(SIDES, (256, 101))
    return Reference(points, burgers_solution(points, viscosity), shape=(101, 256))


SHARP = 0.01 / math.pi
TASKS = (
    PhysicsTask(
        "burgers",
        "Burgers' equation with a shock",
        "u_t + u u_x = 0.01/π u_xx, u(x, 0) = -sin πx, u(±1, t) = 0; 4,000 + 300 + 300 points, the first closer "
        "where the residual is large, with weights; tanh MLP 2-20-20-20-20-1. Held out: relative L2 error.",
        partial(mlp, (2, 20, 20, 20, 20, 1)),
        (
            Condition("equation", _equation(SHARP), box(SIDES), 4000, by_residual=SIDES),
            Condition("initial", _initial, face(SIDES, 1, 0.0), 300),
            Condition("boundary", lambda u, x: u(x), boundary(SIDES, [0]), 300),
        ),
        partial(_reference, SHARP),
        first=1150,
    ),
    PhysicsTask(
        "burgers-smooth",
        "Burgers' equation, periodic",
        "u_t + u u_x = 0.01 u_xx, u(x, 0) = -sin πx, periodic by its inputs sin πx, cos πx, t; 4,000 + 300 points, "
        "the first closer where the residual is large, with weights; tanh MLP 3-20-20-20-20-1. Held out: relative L2 "
        "error.",
        lambda: nn.Sequential(Periodic(0, 2.0), mlp((3, 20, 20, 20, 20, 1))),
        (
            Condition("equation", _equation(0.01), box(SIDES), 4000, by_residual=SIDES),
            Condition("initial", _initial, face(SIDES, 1, 0.0), 300),
        ),
        partial(_reference, 0.01),
        first=1075,
    ),
)
