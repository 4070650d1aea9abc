"""Damped least squares by the normal equations of a Jacobian that has no fewer rows than columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.condensed import in_all_rows
from imstep.linalg.gram import BLOCK, DenseRows, RowMatrix
from imstep.linalg.gram_factorisation import Factorisation, StepSpace
from imstep.linalg.reduced import DampedLeastSquares, ShiftedInverse


class NormalLeastSquares(DampedLeastSquares):
    """Damped least squares from JᵀJ, whose coordinates are the entries of d.

        u' = -(JᵀJ + λI)⁻¹ (Jᵀρ + λu)

    JᵀJ has the square of J's condition, which does not matter as long as λ is far above its rounding: what a solution
    lacks is then a small part of itself.

    Args:
        jacobian: J, (N, n).

    Cost: 2 N n² operations to set up, n³/3 for each new λ, 4 N n for each ρ; 3 n² numbers, products with J where it is
        not written out.

    Source: Björck, Numerical Methods for Least Squares Problems (1996), section 2.2.

    Example:
        >>> from imstep.linalg import DenseRows
        >>> J = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        >>> problem = NormalLeastSquares(DenseRows(J))
        >>> problem.solve(torch.tensor([3.0, 2.0, 5.0]).double(), torch.zeros(2).double(), 1.0)
        tensor([-0.9000, -1.0000], dtype=torch.float64)
    """

    kind = "normal"

    def __init__(self, jacobian: RowMatrix) -> None:
        super().__init__(jacobian.shape[1])
        self._jacobian = jacobian
        squares = torch.zeros(self.rank, self.rank, dtype=torch.float64, device=jacobian.device)
        for block in jacobian.blocks(BLOCK):
            squares.addmm_(block.mT, block)
        self._inverse = ShiftedInverse(squares)

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        return -self._inverse(torch.add(self._jacobian.T @ residuals, coordinates, alpha=damping), damping)

    def image(self, coordinates: Tensor) -> Tensor:
        return self._jacobian @ coordinates

    def dual_norm(self, gradient: Tensor, damping: float) -> float:
        return float((gradient @ self._inverse(gradient, damping)).clamp(min=0).sqrt())

    def vector(self, coordinates: Tensor) -> Tensor:
        """d, (n,)."""
        return coordinates


@dataclass(frozen=True)
class NormalEquations(Factorisation):
    """All of JᵀJ, by Cholesky's factorisation anew for each λ: nothing is left out, whatever the tolerance.

    For λ above the rounding of JᵀJ, some 1e-14 of its trace; below that :class:`ThinFactorisation` does.

    Cost: :class:`NormalLeastSquares`, and J written out, N n numbers, where that are up to 2²⁴.

    Example:
        >>> from imstep.linalg import DenseRows
        >>> NormalEquations().of(DenseRows(torch.eye(4, 3, dtype=torch.float64)), 0.0, draw=0).reduced.kind
        'normal'
    """

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        rows, rotation = jacobian.condensed()
        if rows.shape[0] * rows.shape[1] <= BLOCK:
            rows = DenseRows(rows.written_out())
        normal = NormalLeastSquares(rows)
        return in_all_rows(StepSpace(normal, normal.vector), rotation)
