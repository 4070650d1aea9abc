"""Quasi-Newton updates by several exact products at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.linalg.operator import LinearOperator


class BlockBFGSPreconditioner(LinearOperator):
    """A preconditioner P updated by blocks (S, Y), Y = (A + λI) S, so that P Y = S for the last.

        P <- S Λ Sᵀ + (I - S Λ Yᵀ) P (I - Y Λ Sᵀ),   Λ = (SᵀY)⁻¹

    Args:
        base: P to start with, symmetric positive definite.
        blocks: (S, A S), (n, q) each, oldest first. Those where SᵀY is not safely positive definite are left out.
        damping: λ >= 0.

    Cost: two products with S, with Y and with Λ for each block, and one application of the base.

    Source: Gower, Goldfarb and Richtárik, ICML 2016 (arXiv 1603.09649), (8) and Algorithm 2.

    Example:
        >>> from imstep.linalg import DiagonalOperator, IdentityOperator
        >>> A, S = DiagonalOperator(torch.tensor([1.0, 10.0, 100.0])), torch.eye(3)[:, 1:]
        >>> BlockBFGSPreconditioner(IdentityOperator.like(A), [(S, A @ S)]) @ (A @ torch.ones(3))
        tensor([1., 1., 1.])
    """

    def __init__(self, base: LinearOperator, blocks: Sequence[tuple[Tensor, Tensor]], damping: float = 0.0) -> None:
        if not damping >= 0:
            raise ValueError(f"damping must be at least 0, got {damping}.")
        super().__init__(base.size, base.dtype, base.device)
        self._base = base
        self._updates = [update for S, image in blocks if (update := _update(S, image, damping)) is not None]

    def __len__(self) -> int:
        return len(self._updates)

    def matvec(self, vector: Tensor) -> Tensor:
        q, parts = vector.clone(), []
        for S, Y, root in reversed(self._updates):
            parts.append(torch.cholesky_solve((S.mT @ q)[:, None], root)[:, 0])
            q -= Y @ parts[-1]
        q = self._base.matvec(q)
        for (S, Y, root), part in zip(self._updates, reversed(parts), strict=True):
            q = q + S @ (part - torch.cholesky_solve((Y.mT @ q)[:, None], root)[:, 0])
        return q


def _update(S: Tensor, image: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """S, Y and the Cholesky factor of SᵀY."""
    Y = image + damping * S
    core = S.mT @ Y
    core = (core + core.mT) / 2
    if not bool(core.isfinite().all()):
        return None
    # Rounding alone must not make it definite.
    margin = len(S) * torch.finfo(S.dtype).eps * float(core.abs().max())
    if int(torch.linalg.cholesky_ex(core - margin * torch.eye(len(core)).to(core)).info) != 0:
        return None
    return S, Y, torch.linalg.cholesky(core)
