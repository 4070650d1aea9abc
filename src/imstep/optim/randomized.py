"""Solvers of a step within random subspaces."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from imstep.linalg import AbsoluteEigenvalues, IndefiniteRule, sketched_newton
from imstep.optim.direction import Direction, descent
from imstep.optim.solving import NewtonSystem, Solver


@dataclass(frozen=True)
class RandomSubspace(Solver):
    """Newton's step within a random subspace, another one in every step.

        d = -S (Sᵀ(A + λI)S)⁻¹ Sᵀg,   S (n, s) with normal entries

    Args:
        dimension: s, at most; >= 1.
        indefinite: what stands for the eigenvalues of the small matrix where it is not positive definite.
        seed: of S; it does not touch the global random state.

    Cost: s products, as one block, and as many vectors.

    Source: Gower, Kovalev, Lieder and Richtárik, NeurIPS 2019 (arXiv 1905.10874), Algorithm 1.
    """

    dimension: int = 32
    indefinite: IndefiniteRule = field(default_factory=AbsoluteEigenvalues)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"dimension, of the random subspace, is at least 1, got {self.dimension}.")

    def solve(self, system: NewtonSystem) -> Direction:
        operator, rhs = system.operator, -system.gradient
        # By the step's number, so that a resumed optimizer goes on with the same subspaces.
        generator = torch.Generator(device=rhs.device).manual_seed(1_000_003 * self.seed + system.step)
        shape = operator.size, min(self.dimension, operator.size)
        sketch = torch.randn(shape, generator=generator, dtype=rhs.dtype, device=rhs.device)
        sketch = sketch if system.mask is None else system.mask[:, None] * sketch
        result = sketched_newton(operator, rhs, sketch, damping=system.damping, indefinite=self.indefinite)
        return descent(operator, system.gradient, result)
