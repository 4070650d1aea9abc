"""Damped least squares by the singular values of a Jacobian that is stored, without its Gram matrix; also in a box."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep.linalg.box import box_least_squares
from imstep.linalg.reduced import DampedLeastSquares


class ThinLeastSquares(DampedLeastSquares):
    """Damped least squares from J = U S Vᵀ.

        d = V u,   u' = -(S² + λI)⁻¹ (S Uᵀρ + λu)

    JJᵀ and JᵀJ have the square of J's condition; this does without them.

    Args:
        matrix: J, (N, n), float64, finite.

    Cost: about 4 N n min(N, n) operations; then N n for each ρ, whatever λ.

    Source: Golub and Van Loan, Matrix Computations (2013), section 6.1.4.

    Example:
        >>> J = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        >>> thin = ThinLeastSquares(J)
        >>> thin.vector(thin.solve(torch.tensor([3.0, 2.0, 5.0]).double(), torch.zeros(2).double(), 1.0))
        tensor([-0.9000, -1.0000], dtype=torch.float64)
    """

    kind = "singular values"

    def __init__(self, matrix: Tensor) -> None:
        self._left, self._values, right = torch.linalg.svd(matrix, full_matrices=False)
        self._right = right.masked_fill(~matrix.any(0), 0.0)  # an entry that nothing depends on stays where it is
        super().__init__(len(self._values))

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        slope = torch.add(self._values * (self._left.mT @ residuals), coordinates, alpha=damping)
        return -slope / (self._values.square() + damping)

    def image(self, coordinates: Tensor) -> Tensor:
        return self._left @ (self._values * coordinates)

    def dual_norm(self, gradient: Tensor, damping: float) -> float:
        if self._right.shape[0] < self._right.shape[1]:  # a new gradient need not lie in the span
            return super().dual_norm(gradient, damping)
        return float((self._right @ gradient / (self._values.square() + damping).sqrt()).norm())

    def vector(self, coordinates: Tensor) -> Tensor:
        """d, (n,)."""
        return self._right.mT @ coordinates


class BoxLeastSquares(DampedLeastSquares):
    """Damped least squares with bounds on each entry of the step: min ‖ρ + J d‖² + λ‖d‖², lower <= d <= upper.

    The coordinates are the entries of d.

    Args:
        matrix: J, (N, n), float64, finite.
        lower, upper: (n,), lower <= 0 <= upper; infinite where there is none.

    Cost: as :class:`ThinLeastSquares`, and a factorisation of (2n, n) numbers for each change of the set of bounds that
        hold; few, where it is about that of the last solution.

    Source: a Levenberg-Marquardt method with constrained subproblems, Kanzow, Yamashita and Fukushima, J. Comput. Appl.
        Math. 172 (2004), 375-397, section 2.
    """

    kind = "box"

    def __init__(self, matrix: Tensor, lower: Tensor, upper: Tensor) -> None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        super().__init__(matrix.shape[1])
        self._left, self._triangle, self._bounds = left, values[:, None] * right, (lower, upper)

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        target = self._triangle @ coordinates - self._left.mT @ residuals
        return box_least_squares(self._triangle, target, damping, *self._bounds) - coordinates

    def image(self, coordinates: Tensor) -> Tensor:
        return self._left @ (self._triangle @ coordinates)

    def dual_norm(self, gradient: Tensor, damping: float) -> float:
        """Of the entries of a gradient that are not zero: those that are may be held by their bounds."""
        free = gradient != 0
        if not bool(free.any()):
            return 0.0
        root = damping**0.5 * torch.eye(int(free.sum()), dtype=gradient.dtype, device=gradient.device)
        r = torch.linalg.qr(torch.cat([self._triangle[:, free], root]), mode="r").R
        return float(torch.linalg.solve_triangular(r.mT, gradient[free][:, None], upper=False).norm())

    def project(self, coordinates: Tensor) -> Tensor:
        return coordinates.clamp(*self._bounds)

    def vector(self, coordinates: Tensor) -> Tensor:
        """d, (n,)."""
        return coordinates
