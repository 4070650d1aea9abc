"""A preconditioner that learns from earlier solves: limited-memory quasi-Newton updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from imstep.linalg.dots import dots
from imstep.linalg.operator import LinearOperator

_LEAST_COSINE = 1e-6  # of a direction and its image; below it their curvature is mostly rounding in float32


class LimitedMemoryPreconditioner(LinearOperator):
    """A preconditioner P updated by pairs (p, A p) that a Krylov solver met in an earlier solve.

        P <- (I - p yᵀ/c) P (I - y pᵀ/c) + p pᵀ/c,   y = (A + λI) p,   c = pᵀy

    for one pair after the other, the BFGS formula: P y = p holds for the last pair, and for all of them where their
    directions are conjugate. In a sequence of similar systems a solve so starts where the last one ended.

    Args:
        base: P to start with, symmetric positive definite.
        pairs: (p, A p), vectors of shape (n,), oldest first. Pairs whose curvature is not safely positive are left
            out.
        damping: λ >= 0.

    Raises:
        ValueError: λ is negative.

    Cost: two inner products and two updates with vectors for each pair, and one application of the base.

    Source: Morales and Nocedal, SIAM J. Optim. 10 (2000), 1079-1096; the two loops are Algorithm 7.4 of Nocedal and
        Wright, Numerical Optimization (2nd ed.).

    Example:
        >>> import torch
        >>> from imstep.linalg import DiagonalOperator, IdentityOperator
        >>> A, p = DiagonalOperator(torch.tensor([1.0, 100.0])), torch.tensor([0.0, 1.0])
        >>> P = LimitedMemoryPreconditioner(IdentityOperator.like(A), [(p, A @ p)])
        >>> P @ (A @ torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, base: LinearOperator, pairs: Sequence[tuple[Tensor, Tensor]], damping: float = 0.0) -> None:
        if not damping >= 0:
            raise ValueError(f"damping must be at least 0, got {damping}.")
        super().__init__(base.size, base.dtype, base.device)
        self._base = base
        self._updates = _updates(pairs, damping)

    def __len__(self) -> int:
        return len(self._updates)

    def matvec(self, vector: Tensor) -> Tensor:
        q, factors = vector.clone(), []
        for p, y, curvature in reversed(self._updates):
            factors.append((p @ q) / curvature)
            q.sub_(factors[-1] * y)
        q = self._base.matvec(q)
        for (p, y, curvature), factor in zip(self._updates, reversed(factors), strict=True):
            q.add_((factor - (y @ q) / curvature) * p)
        return q


def _updates(pairs: Sequence[tuple[Tensor, Tensor]], damping: float) -> list[tuple[Tensor, Tensor, float]]:
    """p, y and pᵀy of the pairs whose curvature is safely positive; one synchronisation of the device for all."""
    damped = [(p, image.add(p, alpha=damping) if damping > 0 else image) for p, image in pairs]
    numbers = dots(*(ends for p, y in damped for ends in ((p, y), (p, p), (y, y)))) if damped else ()
    return [
        (p, y, curvature)
        for (p, y), curvature, p2, y2 in zip(damped, numbers[::3], numbers[1::3], numbers[2::3], strict=True)
        if math.isfinite(curvature) and curvature > _LEAST_COSINE * math.sqrt(p2 * y2)
    ]
