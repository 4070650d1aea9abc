"""The matrix that symmetric rank-one updates make of a multiple of the identity, in compact form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.linalg.operator import LinearOperator


class RankOneOperator(LinearOperator):
    """The symmetric rank-one (SR1) matrix B of pairs (s, y), with B s = y for each that counts.

        B = γI + Ψ M⁺ Ψᵀ,   Ψ = Y - γS,   M = D + L + Lᵀ - γ SᵀS

    D and L are the diagonal and the strict lower triangle of SᵀY. B may be indefinite, as a Hessian may be. Pairs count
    by their directions. Eigenvalues of M below eps^(1/2) of the largest are left out: they belong to updates whose
    denominators vanish.

    Args:
        pairs: (s, y), vectors of shape (n,), oldest first; at least one.
        gamma: γ.

    Raises:
        ValueError: no pairs, or γ is not finite.

    Cost: 2 k inner products or sums of vectors for k pairs; k² inner products when it is made.

    Source: Byrd, Nocedal and Schnabel, Mathematical Programming 63 (1994), Theorem 5.1; Nocedal and Wright, Numerical
        Optimization (2nd ed.), (7.30) and (6.26); the pseudoinverse in place of skipped updates is our choice.

    Example:
        >>> s, y = torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])
        >>> B = RankOneOperator([(s, y)], gamma=1.0)
        >>> B @ s, B @ torch.tensor([0.0, 3.0])
        (tensor([-2.,  0.]), tensor([0., 3.]))
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], gamma: float) -> None:
        if not pairs or not math.isfinite(gamma):
            raise ValueError(f"a rank-one matrix needs at least one pair and a finite γ, got {len(pairs)} and {gamma}.")
        norms = [step.norm() for step, _ in pairs]
        steps = torch.stack([step / norm for (step, _), norm in zip(pairs, norms, strict=True)])
        changes = torch.stack([change / norm for (_, change), norm in zip(pairs, norms, strict=True)])
        super().__init__(steps.shape[1], steps.dtype, steps.device)
        products, sizes = (steps @ changes.mT).double(), (steps @ steps.mT).double()
        values, vectors = torch.linalg.eigh(products.tril() + products.tril(-1).mT - gamma * sizes)
        kept = values.abs() > math.sqrt(torch.finfo(steps.dtype).eps) * values.abs().max()
        self._gamma, self._weights = gamma, (1 / values[kept]).to(steps)
        self._factors = vectors[:, kept].mT.to(steps) @ (changes - gamma * steps)  # (kept, n)

    def matvec(self, vector: Tensor) -> Tensor:
        return torch.addmv(self._gamma * vector, self._factors.mT, self._weights * (self._factors @ vector))
