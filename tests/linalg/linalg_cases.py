"""Operators that several tests of solvers work on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imstep.linalg import DenseOperator, KrylovResult, LinearOperator


class Counted(DenseOperator):
    """A matrix that counts its products, a block of k as k."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.products = 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return super().matvec(vector)

    def matmat(self, block: Tensor) -> Tensor:
        self.products += block.shape[1]
        return super().matmat(block)


class Failing(LinearOperator):
    """A diagonal operator whose product number `fails_at` contains `value`."""

    def __init__(self, diagonal: Tensor, fails_at: int, value: float = math.nan) -> None:
        super().__init__(diagonal.numel(), diagonal.dtype, diagonal.device)
        self.diagonal, self.fails_at, self.value, self.products = diagonal, fails_at, value, 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        product = self.diagonal * vector
        if self.products == self.fails_at:
            product[-1] = self.value
        return product


def assert_optimal(
    matrix: Tensor, rhs: Tensor, radius: float, result: KrylovResult, *, damping: float = 0.0, accuracy: float = 1e-8
) -> None:
    """The conditions of Moré and Sorensen, which hold for a global solution of the trust-region problem only."""
    shifted = matrix + damping * torch.eye(len(rhs), dtype=matrix.dtype)
    x, multiplier, values = result.solution.double(), result.multiplier, torch.linalg.eigvalsh(shifted)
    assert multiplier is not None
    size = values.abs().max().item() + multiplier
    assert (rhs - shifted @ x - multiplier * x).norm() <= accuracy * (rhs.norm().item() + size * radius)
    assert multiplier >= 0
    assert x.norm().item() <= radius * (1 + accuracy)
    assert multiplier * (radius - x.norm().item()) <= accuracy * size * radius
    assert values[0].item() + multiplier >= -accuracy * size
