"""Damped least squares by iterations in all of J, preconditioned by few of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep.linalg.cg import conjugate_gradient
from imstep.linalg.gram import RowMatrix
from imstep.linalg.gram_factor import GramFactor
from imstep.linalg.nystrom import NystromApproximation
from imstep.linalg.operator import LinearOperator
from imstep.linalg.reduced import DampedLeastSquares
from imstep.linalg.stopping import ProgressStall, RelativeResidual


class IterativeLeastSquares(DampedLeastSquares):
    """Damped least squares by conjugate gradients on JᵀJ + λI, whose coordinates are the entries of d.

        JᵀJ ≈ B FᵀF Bᵀ = U Θ Uᵀ   makes the preconditioner   U (Θ + λI)⁻¹ Uᵀ + (I - U Uᵀ) / (Θ_k + λ)

    F and B come from few columns of JJᵀ; products with J do the rest. What the iterations leave undone is corrected by
    later ones, which start from the residuals that are met.

    Args:
        jacobian: J, of any shape.
        factor: of JJᵀ, with pivots.
        progress: the iterations end where the decrease grows by less than this share of itself in one of them.
        iterations: at most.

    Cost: 6 n k² + 2 N k² operations to set up, (n + 2 p) k numbers; a product with J and one with Jᵀ an iteration.

    Source: Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44 (2023), 718-752 (arXiv 2110.02820), for the
        preconditioner; that its sketch consists of rows of J is our choice.

    Example:
        >>> from imstep.linalg import DenseRows, partial_cholesky
        >>> J = DenseRows(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
        >>> problem = IterativeLeastSquares(J, partial_cholesky(J.gram(), 0.0, most=1))
        >>> problem.solve(torch.tensor([3.0, 2.0, 5.0]).double(), torch.zeros(2).double(), 1.0)
        tensor([-0.9000, -1.0000], dtype=torch.float64)
    """

    kind = "sketch"

    def __init__(
        self, jacobian: RowMatrix, factor: GramFactor, progress: float = 1e-4, iterations: int = 200
    ) -> None:
        super().__init__(jacobian.shape[1])
        assert factor.pivots is not None
        self._jacobian, self._iterations = jacobian, iterations
        self._normal = _Normal(jacobian)
        self._stopping = (RelativeResidual(1e-10), ProgressStall(progress))
        # The basis is orthonormal only as far as the small eigenvalues of K[S, S] allow.
        basis, small = torch.linalg.qr(jacobian.rows(factor.pivots).written_out().mT @ factor.combination)
        inner = small @ (factor.factor.mT @ factor.factor) @ small.mT
        values, rotation = torch.linalg.eigh((inner + inner.mT) / 2)
        self._sketch = NystromApproximation(basis @ rotation.flip(1), values.flip(0).clamp(min=0))

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        slope = torch.add(self._jacobian.T @ residuals, coordinates, alpha=damping)
        return conjugate_gradient(
            self._normal,
            -slope,
            damping=damping,
            preconditioner=self._sketch.preconditioner(damping),
            stopping=self._stopping,
            max_iterations=self._iterations,
        ).solution

    def image(self, coordinates: Tensor) -> Tensor:
        return self._jacobian @ coordinates

    def vector(self, coordinates: Tensor) -> Tensor:
        """d, (n,)."""
        return coordinates


class _Normal(LinearOperator):
    """JᵀJ."""

    def __init__(self, jacobian: RowMatrix) -> None:
        super().__init__(jacobian.shape[1], jacobian.dtype, jacobian.device)
        self._jacobian = jacobian

    def matvec(self, vector: Tensor) -> Tensor:
        return self._jacobian.normal(vector)
