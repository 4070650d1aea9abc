"""A Jacobian by few of its rows: partial QR factorisation of its transpose with pivots."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative
from imstep.linalg.gram_factor import FIRST, next_block
from imstep.linalg.partial_cholesky import CANDIDATES, greedy_pivots, spread
from imstep.linalg.precision import full_precision
from imstep.linalg.triangular import BlockQR, TriangularLeastSquares

ROUNDING = 1e-29
"""Of the squared norm: what may be left over at least, since rounding leaves about 1e-32 of it times the columns."""
_ANEW = 1e-13
"""Of the squared norm of J, or of what was left of it last: from there on what is left is computed anew."""


@dataclass(frozen=True, eq=False)
class RowFactor:
    """J ≈ F Wᵀ, where W is an orthonormal basis of a part of the span of the rows of J, and F = J W.

    Attributes:
        factor: F, (N, k).
        basis: W, (n, k).
        remainder: ‖J - F Wᵀ‖².
        pivots: the rows of J that W is made of, (k,).
    """

    factor: Tensor
    basis: Tensor
    remainder: float
    pivots: Tensor

    def shortened(self, allowed: Tensor) -> RowFactor:
        """By the first rows alone, as few as leave no more than is allowed, by their number from 0 to k, (k+1,), or ().

        W comes from the rows by Gram and Schmidt's process, in order.
        """
        energies = torch.cat([self.factor.square().sum(0), self.factor.new_tensor([self.remainder])])
        left = energies.flip(0).cumsum(0).flip(0)
        enough = (left <= allowed.to(left)).nonzero()
        if not len(enough):
            return self
        k = int(enough[0])
        return RowFactor(self.factor[:, :k], self.basis[:, :k], float(left[k]), self.pivots[:k])


@full_precision
def partial_qr(matrix: Tensor, tolerance: float, *, most: int = sys.maxsize) -> RowFactor:
    """Take rows of J into a basis until the squared norm of what they leave is at most a tolerance.

    Pivots are taken in blocks as by :func:`partial_cholesky`. What they leave, J - F Wᵀ, is computed where rounding
    would spoil the difference ‖J‖² - ‖F‖², so that it is known to the square of rounding; of JJᵀ, from which that
    function has it, rounding spoils far more.

    Args:
        matrix: J, (N, n), float64, finite.
        tolerance: >= 0; with 0 it goes on to the rank that rounding allows.
        most: rows at most; it stops before a block that would be more, and where many more are to be expected.

    Raises:
        ValueError: the tolerance is negative or not finite.

    Cost: 2 N n k operations for k rows, and as many for those that were taken before what is left was computed; N n
        numbers.

    Source: Golub and Van Loan, Matrix Computations (2013), section 5.4.2, of Jᵀ; pivots in blocks as in
        :func:`partial_cholesky`.

    Example:
        >>> rows = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None] ** torch.arange(5)
        >>> found = partial_qr(rows, tolerance=1e-20)
        >>> bool((found.factor @ found.basis.T - rows).abs().max() < 1e-10)
        True
    """
    check_not_negative(tolerance=tolerance)
    left, squares = matrix, torch.linalg.vector_norm(matrix, dim=1).square()
    remainder = at_last = float(squares.sum())
    tolerance, count, size = max(tolerance, ROUNDING * remainder), max(1, min(FIRST, most)), min(matrix.shape)
    factor, basis, known = matrix[:, :0], matrix.new_zeros(matrix.shape[1], 0), 0
    chosen = torch.zeros(0, dtype=torch.long, device=matrix.device)
    met = basis.new_zeros(len(basis), dtype=torch.bool)  # an entry that nothing depends on stays where it is
    while remainder > tolerance and (taken := len(basis.mT)) < size and min(taken + count, size) <= most:
        index = spread(squares, CANDIDATES * count)
        rows = torch.addmm(left[index], factor[index, known:], basis[:, known:].mT, alpha=-1)
        pivots = greedy_pivots(rows @ rows.mT, min(count, size - taken))
        new, met = rows[pivots].mT, met | matrix[index[pivots]].any(0)
        chosen = torch.cat([chosen, index[pivots]])
        for _ in range(2):  # a small row is orthogonal to the basis only as far as rounding of the whole row allows
            new = torch.linalg.qr(torch.addmm(new, basis, basis.mT @ new, alpha=-1)).Q
        new = new * met[:, None]
        added = left @ new
        factor, basis = torch.cat([factor, added], 1), torch.cat([basis, new], 1)
        squares = (squares - added.square().sum(1)).clamp_(min=0)
        before, remainder = remainder, float(squares.sum())
        if remainder < _ANEW * at_last:
            left = torch.addmm(left, factor[:, known:], basis[:, known:].mT, alpha=-1)
            known, squares = len(basis.mT), torch.linalg.vector_norm(left, dim=1).square()
            remainder = at_last = float(squares.sum())
        count = next_block(len(basis.mT), new.shape[1], before, remainder, tolerance, most)
    return RowFactor(factor, basis, remainder, chosen).shortened(squares.new_tensor(tolerance))


class RowLeastSquares(TriangularLeastSquares):
    """Damped least squares within the span of few rows of J ≈ F Wᵀ, whose coordinates are those of d in W.

        min ‖ρ + F u‖² + λ‖u‖²,   d = W u

    Args:
        rows: F and W.

    Cost: 2 N k² operations to set up, 4 k³/3 for each new λ.

    Source: as :class:`TriangularLeastSquares`, of F.
    """

    kind = "rows"

    def __init__(self, rows: RowFactor) -> None:
        super().__init__(BlockQR([rows.factor]))
        self._basis = rows.basis

    def dual_norm(self, gradient: Tensor, damping: float) -> float:
        inside = self._basis.mT @ gradient
        outside = float((gradient - self._basis @ inside).norm())
        return math.hypot(super().dual_norm(inside, damping), outside / damping**0.5)

    def vector(self, coordinates: Tensor) -> Tensor:
        """d, (n,)."""
        return self._basis @ coordinates
