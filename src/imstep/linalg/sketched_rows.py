"""A Jacobian by few of its rows, which are found in a sketch of it."""

from __future__ import annotations

import torch

from imstep.linalg.arguments import check_not_negative
from imstep.linalg.gram import RowMatrix
from imstep.linalg.partial_qr import RowFactor, partial_qr
from imstep.linalg.precision import full_precision

_SPARE = 32
"""Columns of a sketch, at least, beyond the rows that are taken."""
_LEAST = 1e-26
"""Of the squared norm: below that rows of a sketch are rounding of those before, or one of them again."""


@full_precision
def sketched_rows(jacobian: RowMatrix, tolerance: float, *, most: int, draw: int = 0) -> RowFactor:
    """Few rows of J, as by :func:`partial_qr`, from the rows of a sketch Y = J Ω with 5/4 as many columns as ``most``.

        Y ≈ F_Y W_Yᵀ with pivots S,   (J[S, :])ᵀ = W R,   F = F_Y (F_Y[S, :])⁻¹ Rᵀ

    Every row of Y is a combination of those at S, C = F_Y (F_Y[S, :])⁻¹, and so is every row of J with the same C: F is
    C J[S, :] W. Of J itself no more than the rows at S is written out.

    Args:
        jacobian: J, (N, n).
        tolerance: for the squared norm of what is left, >= 0.
        most: rows at most, >= 0.
        draw: numbers the calls: the random Ω follows from it and nothing else.

    Returns:
        As :func:`partial_qr`; the remainder is an estimate. C has been fitted to p columns of a sketch by k numbers a
        row, so that what is left of J is (1 - k/p)⁻² times what is left of Y; within an eighth in 44 cases.

    Raises:
        ValueError: the tolerance is negative or not finite.

    Cost: the sketch; for k rows and p columns 2 N p k to 4 N p k operations, and 4 n k²; N p + n k numbers.

    Source: interpolative decompositions by a random sketch, Halko, Martinsson and Tropp, SIAM Review 53 (2011),
        section 5.2, and Dong and Martinsson (arXiv 2104.05877); pivots as by :func:`partial_qr`, and the estimate, are
        ours.

    Example:
        >>> from imstep.linalg import DenseRows
        >>> rows = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None] ** torch.arange(100)
        >>> found = sketched_rows(DenseRows(rows), tolerance=1e-12, most=40)
        >>> bool((found.factor @ found.basis.T - rows).norm() < 2e-6)
        True
    """
    check_not_negative(tolerance=tolerance)
    width = max(most + most // 4, most + _SPARE)
    generator = torch.Generator(device=jacobian.device).manual_seed(draw)
    sketch = jacobian.sketched(width, generator)
    tolerance = max(tolerance, _LEAST * float(torch.linalg.vector_norm(sketch)) ** 2)
    fitted = lambda rows: (1 - rows / width) ** 2
    found = partial_qr(sketch, tolerance * fitted(most), most=most)
    found = found.shortened(tolerance * fitted(torch.arange(len(found.pivots) + 1, dtype=torch.float64)))
    rows = jacobian.rows(found.pivots).written_out()
    basis, triangle = torch.linalg.qr(rows.mT)
    basis = basis * rows.any(0)[:, None]  # an entry that nothing depends on stays where it is
    factor = found.factor @ torch.linalg.solve(found.factor[found.pivots], triangle.mT)
    return RowFactor(factor, basis, found.remainder / fitted(len(found.pivots)), found.pivots)
