"""A positive semidefinite matrix by few of its columns: partial Cholesky factorisation with pivots."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative
from imstep.linalg.operator import LinearOperator

_FIRST = 48
_GROWTH = 0.5
_FLOOR = 1e-14  # of the trace: what cancellation leaves of a column in float64


class GramMatrix(LinearOperator):
    """A symmetric positive semidefinite matrix K, (N, N), that also tells its diagonal and its columns; float64."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of K, (N,)."""

    @abstractmethod
    def columns(self, index: Tensor) -> Tensor:
        """K[:, index], (N, k)."""


class DenseGram(GramMatrix):
    """A symmetric positive semidefinite matrix that is stored, (N, N), as float64."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), torch.float64, matrix.device)
        self._matrix = matrix.double()

    def matvec(self, vector: Tensor) -> Tensor:
        return self._matrix @ vector

    def diagonal(self) -> Tensor:
        return self._matrix.diagonal()

    def columns(self, index: Tensor) -> Tensor:
        return self._matrix[:, index]


@dataclass(frozen=True, eq=False)
class PartialCholesky:
    """K ≈ F Fᵀ from the columns of K at a few pivots S: F = K[:, S] R, with Rᵀ K[S, S] R = I.

    What is missing, K - F Fᵀ, is positive semidefinite. If K = J Jᵀ, the columns of Jᵀ[:, S] R are an orthonormal basis
    of the span of the rows of J at S, and F is J in that basis.

    Attributes:
        factor: F, (N, k).
        pivots: S, (p,), p >= k; an index may stand there twice.
        combination: R, (p, k).
        remainder: the trace of K - F Fᵀ, which bounds its largest eigenvalue.
    """

    factor: Tensor
    pivots: Tensor
    combination: Tensor
    remainder: float

    @property
    def rank(self) -> int:
        """k."""
        return self.factor.shape[1]


def partial_cholesky(matrix: GramMatrix, tolerance: float) -> PartialCholesky:
    """Take columns of K until the trace of what they leave is at most a tolerance.

    Pivots are taken in blocks, each half as large as all before, spread evenly over the cumulated diagonal of what is
    left: in proportion to it, and without chance.

    Args:
        matrix: K.
        tolerance: >= 0; with 0 the factorisation goes on to the rank that rounding allows.

    Raises:
        ValueError: the tolerance is negative or not finite.

    Cost: p columns of K, about N p² operations and N p numbers; p grows with the number of eigenvalues of K above the
        tolerance, whatever N.

    Source: Chen, Epperly, Tropp and Webber, "Randomly pivoted Cholesky" (arXiv 2207.06503); the spread in place
        of chance, and the growing blocks, are our choice.

    Example:
        >>> from imstep.linalg import DenseGram
        >>> rows = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None] ** torch.arange(5)
        >>> found = partial_cholesky(DenseGram(rows @ rows.T), tolerance=1e-8)
        >>> found.rank, bool((found.factor @ found.factor.T - rows @ rows.T).abs().max() < 1e-8)
        (5, True)
    """
    check_not_negative(tolerance=tolerance)
    left = matrix.diagonal().clamp(min=0)
    least = _FLOOR * float(left.sum())
    size = matrix.size
    factor, combination = left.new_zeros(size, 0), left.new_zeros(0, 0)
    pivots = torch.zeros(0, dtype=torch.long, device=left.device)
    remainder = float(left.sum())
    while remainder > max(tolerance, 4 * least) and factor.shape[1] < size:
        new = _spread(left, max(_FIRST, int(_GROWTH * len(pivots))))
        columns = matrix.columns(new)
        known = factor[new]
        columns.addmm_(factor, known.mT, alpha=-1)
        root = _inverse_root(columns[new], least)
        if root.shape[1] == 0:
            break
        added = columns @ root
        upper = torch.cat([combination, -combination @ (known.mT @ root)], 1)
        lower = torch.cat([root.new_zeros(len(new), factor.shape[1]), root], 1)
        combination, pivots = torch.cat([upper, lower]), torch.cat([pivots, new])
        factor = torch.cat([factor, added], 1)
        left = (left - added.square().sum(1)).clamp_(min=0)
        remainder = float(left.sum())
    return PartialCholesky(factor, pivots, combination, remainder)


def _spread(weights: Tensor, count: int) -> Tensor:
    """Up to ``count`` different indices at even steps of the cumulated weights."""
    cumulated = weights.cumsum(0)
    steps = (torch.arange(count, dtype=weights.dtype, device=weights.device) + 0.5) / count * cumulated[-1]
    return torch.searchsorted(cumulated, steps).clamp_(max=len(weights) - 1).unique()


def _inverse_root(block: Tensor, least: float) -> Tensor:
    """B with Bᵀ W B = I for a positive semidefinite W, on the eigenvectors that rounding has not spoilt.

    What is left out may become a pivot again, once the larger part of it is gone.
    """
    values, vectors = torch.linalg.eigh((block + block.mT) / 2)
    kept = values > max(1e-12 * float(values[-1]), least)
    return vectors[:, kept] * values[kept].rsqrt()
