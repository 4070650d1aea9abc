"""Damped least squares within the span of a few rows of a Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep.linalg.partial_cholesky import PartialCholesky


class ReducedLeastSquares:
    """Solves min ‖ρ + F u‖² + λ‖u‖² for u, for several ρ and λ.

    With F from a :class:`PartialCholesky` factorisation of J Jᵀ and the step d = Jᵀ[:, S] R u, ‖d‖ = ‖u‖ and J d = F u:
    this is min ‖ρ + J d‖² + λ‖d‖² over the span of the rows of J at the pivots. If J Jᵀ = F Fᵀ it is the minimum over
    all d, since that lies in the span of all rows:

        d = -(JᵀJ + λI)⁻¹ Jᵀρ = -Jᵀ (JJᵀ + λI)⁻¹ ρ

    Args:
        factorisation: F, S and R.

    Cost: N k² operations to set up, k³/3 for each new λ.

    Source: the last identity, for neural networks, in Rende et al. (arXiv 2310.05715).
    """

    def __init__(self, factorisation: PartialCholesky) -> None:
        self._factor, self._combination = factorisation.factor, factorisation.combination
        self._normal = self._factor.mT @ self._factor
        self._damping, self._cholesky = -1.0, self._normal

    @property
    def rank(self) -> int:
        """k."""
        return self._factor.shape[1]

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        """The u' for which u + u' is the minimiser, where ρ is what the residuals are at u; (k,).

        -(FᵀF + λI)⁻¹ (Fᵀρ + λu): at u = 0 the minimiser itself. Where λ is too small for the rounding of FᵀF it is
        raised.
        """
        if damping != self._damping:
            self._damping, self._cholesky = damping, _shifted_cholesky(self._normal, damping)
        gradient = torch.addmv(damping * coordinates, self._factor.mT, residuals)
        return -torch.cholesky_solve(gradient[:, None], self._cholesky)[:, 0]

    def image(self, coordinates: Tensor) -> Tensor:
        """J d, (N,)."""
        return self._factor @ coordinates

    def weights(self, coordinates: Tensor) -> Tensor:
        """The factors R u of the pivots' rows in d, (p,)."""
        return self._combination @ coordinates


def _shifted_cholesky(matrix: Tensor, shift: float) -> Tensor:
    """The Cholesky factor of M + shift I; the shift grows where rounding has made M indefinite."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    least = len(matrix) * torch.finfo(matrix.dtype).eps * float(matrix.diagonal().sum())
    factor, info = torch.linalg.cholesky_ex(matrix + shift * identity)
    while int(info) != 0:
        shift = max(10 * shift, least)
        factor, info = torch.linalg.cholesky_ex(matrix + shift * identity)
    return factor
