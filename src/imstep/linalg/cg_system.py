"""One iteration of conjugate gradients as pure functions of a state: probe a direction, move along it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from imstep.linalg.halved import HalvedOperator, NoiseTest
from imstep.linalg.operator import LinearOperator
from imstep.linalg.result import KrylovStatus


def dots(*pairs: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """Inner products of pairs of vectors (n,), with one synchronisation of the device for all of them."""
    return tuple(torch.stack([torch.dot(a, b) for a, b in pairs]).tolist())


@dataclass(frozen=True, eq=False)
class Probe:
    """A search direction p and what one product with A tells about it."""

    direction: Tensor
    image: Tensor  # A p, without damping
    squared_norm: float
    curvature: float  # pᵀAp, without damping
    damped_curvature: float
    image_norm: float
    halves: tuple[float, float] | None  # damped curvatures of the two half-batches


@dataclass(frozen=True, eq=False)
class CGState:
    """An iterate and all that the recurrences carry to the next one."""

    solution: Tensor
    image: Tensor  # A x, without damping
    residual: Tensor  # b - (A + λI) x
    direction: Tensor
    descent: float  # rᵀz = rᵀp > 0, the rate at which the model gains along the direction
    norm: float  # ‖x‖
    residual_norm: float
    decreases: tuple[float, ...]
    products: int

    @property
    def iteration(self) -> int:
        return len(self.decreases) - 1


@dataclass(frozen=True, eq=False)
class DampedSystem:
    """(A + λI) x = b with the tests that its directions must pass; the steps of `conjugate_gradient`."""

    operator: LinearOperator
    rhs: Tensor
    damping: float
    preconditioner: LinearOperator | None
    curvature_floor: float
    noise: NoiseTest | None
    radius: float
    refresh_every: float
