"""Damped least squares among residuals: within the span of a few rows of a Jacobian, or of all."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imstep.linalg.gram import GramMatrix
from imstep.linalg.gram_factor import GramFactor


class DampedLeastSquares(ABC):
    """Solves min ‖ρ + J d‖² + λ‖d‖² for steps d given by few coordinates u, for several ρ and λ.

    Args:
        rank: k, how many coordinates there are.

    Attributes:
        kind: what it is made of, a word or two for records.
    """

    kind: str

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @abstractmethod
    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        """The u' for which u + u' is the minimiser, where ρ is what the residuals are at u; (k,).

        At u = 0 the minimiser itself. Where λ is too small for the rounding of the matrix it is raised.
        """

    @abstractmethod
    def image(self, coordinates: Tensor) -> Tensor:
        """J d, (N,)."""

    def inner(self, first: Tensor, second: Tensor) -> Tensor:
        """Inner products dᵀd' of the steps of coordinates (k, a) and (k, b): (a, b).

        By default coordinates are those in an orthonormal basis.
        """
        return first.mT @ second

    def project(self, coordinates: Tensor) -> Tensor:
        """The coordinates, or the nearest that are allowed."""
        return coordinates

    def dual_norm(self, gradient: Tensor, damping: float) -> float:
        """√(gᵀ(JᵀJ + λI)⁻¹g) of a gradient (n,), where that is at hand; else ‖g‖."""
        return float(gradient.norm())

    def norm(self, coordinates: Tensor) -> float:
        """‖d‖."""
        return math.sqrt(max(float(self.inner(coordinates[:, None], coordinates[:, None])), 0.0))


class GramLeastSquares(DampedLeastSquares):
    """Damped least squares from K = J Jᵀ, whose steps are combinations of rows of J.

        d = Jᵀ[:, S] w(u)

    Args:
        rank: k.
        pivots: S, (p,), the rows of J that d is made of; None for all of them, p = N.

    Attributes:
        complete: whether steps are all combinations of rows of J, so that nothing is left out.
    """

    complete = False

    def __init__(self, rank: int, pivots: Tensor | None) -> None:
        super().__init__(rank)
        self.pivots = pivots

    @abstractmethod
    def weights(self, coordinates: Tensor) -> Tensor:
        """The factors w(u) of the rows at S, (p,)."""

    def nearest(self, products: Tensor) -> Tensor:
        """The coordinates of the step nearest to a vector, from the products (p,) of the rows at S with it; where steps
        are not complete.
        """
        raise NotImplementedError


class ReducedLeastSquares(GramLeastSquares):
    """Damped least squares within the span of a :class:`GramFactor` F of K = J Jᵀ.

        min ‖ρ + F u‖² + λ‖u‖²,   d = Jᵀ[:, S] R u,   u' = -(FᵀF + λI)⁻¹ (Fᵀρ + λu)

    With ‖d‖ = ‖u‖ and J d = F u this is the minimum over the span. If K = F Fᵀ it is the minimum over all d, since that
    lies in the span of all rows:

        d = -(JᵀJ + λI)⁻¹ Jᵀρ = -Jᵀ (JJᵀ + λI)⁻¹ ρ

    Args:
        factorisation: F, S and R.

    Cost: N k² operations to set up, k³/3 for each new λ.

    Source: the last identity, for neural networks, in Rende et al. (arXiv 2310.05715).
    """

    kind = "columns"

    def __init__(self, factorisation: GramFactor) -> None:
        super().__init__(factorisation.rank, factorisation.pivots)
        self._factor, self._combination = factorisation.factor, factorisation.combination
        self._inverse = ShiftedInverse(self._factor.mT @ self._factor)

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        return -self._inverse(torch.addmv(damping * coordinates, self._factor.mT, residuals), damping)

    def image(self, coordinates: Tensor) -> Tensor:
        return self._factor @ coordinates

    def weights(self, coordinates: Tensor) -> Tensor:
        return self._combination @ coordinates

    def nearest(self, products: Tensor) -> Tensor:
        return self._combination.mT @ products


class DenseLeastSquares(GramLeastSquares):
    """Damped least squares with all of K = J Jᵀ: the coordinates are the factors of the rows of J.

        d = Jᵀ u,   u' = -(K + λI)⁻¹ (ρ + λu)

    Args:
        matrix: K.

    Cost: all of K to set up, N³/3 operations for each new λ; 3 N² numbers.

    Source: as :class:`ReducedLeastSquares`.
    """

    complete = True
    kind = "dense"

    def __init__(self, matrix: GramMatrix) -> None:
        super().__init__(matrix.size, None)
        self._gram = matrix.dense()
        self._inverse = ShiftedInverse(self._gram)

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        return -self._inverse(torch.add(residuals, coordinates, alpha=damping), damping)

    def image(self, coordinates: Tensor) -> Tensor:
        return self._gram @ coordinates

    def weights(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def inner(self, first: Tensor, second: Tensor) -> Tensor:
        return first.mT @ self.image(second)


class ShiftedInverse:
    """(M + shift I)⁻¹ by Cholesky's factorisation, which the last shift's calls share."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self._shift, self._factor = matrix, -1.0, matrix

    def __call__(self, vector: Tensor, shift: float) -> Tensor:
        if shift != self._shift:
            self._shift, self._factor = shift, _shifted_cholesky(self._matrix, shift)
        lower = self._factor  # torch.cholesky_solve would copy it
        half = torch.linalg.solve_triangular(lower, vector[:, None], upper=False)
        return torch.linalg.solve_triangular(lower.mT, half, upper=True)[:, 0]


def _shifted_cholesky(matrix: Tensor, shift: float) -> Tensor:
    """The Cholesky factor of M + shift I; the shift grows where rounding has made M indefinite."""
    least = len(matrix) * torch.finfo(matrix.dtype).eps * float(matrix.diagonal().sum())
    while True:
        shifted = matrix.clone()
        shifted.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            return factor
        shift = max(10 * shift, least)
