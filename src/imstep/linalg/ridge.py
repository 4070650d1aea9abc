"""Damped least squares with a penalty on where the step leads."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep.linalg.gram_factorisation import StepSpace
from imstep.linalg.operator import LinearOperator
from imstep.linalg.reduced import DampedLeastSquares


class RidgeLeastSquares(DampedLeastSquares):
    """Damped least squares with a penalty Σ c_i (x_i + d_i)², as if √c (x + d) were residuals, without their rows.

        min ‖ρ + J d‖² + Σ c_i (x_i + d_i)² + Σ (T - c_i) d_i²,   T = λ + more

    The coordinates are the entries of d. With y = -d - c x / T, the step from d is

        y + argmin over e of ‖ρ + J y + J e‖² + T‖e‖²,

    where that is solved for in all of J's rows. Where only for e = Q u, with orthonormal Q, J is left out beyond their
    span, so that what is left there is (y - Jᵀρ/T), and steps vanish where the gradient does:

        Q u + (I - Q Qᵀ)(y - Jᵀρ/T)

    Args:
        jacobian: J, (N, n).
        space: damped least squares with J.
        factors: c >= 0, (n,).
        at: x, (n,).
        more: T - λ; with λ >= 0 at least so large that T >= c.

    Cost: that of ``space``, and two products with J.

    Source: our own; the first form completes the square.

    Example:
        >>> from imstep.linalg import DenseRows, ThinFactorisation
        >>> J, one = DenseRows(torch.tensor([[2.0, 0.0]], dtype=torch.float64)), torch.ones(2, dtype=torch.float64)
        >>> ridge = RidgeLeastSquares(J, ThinFactorisation().of(J, 0.0, draw=0), one, one, more=1.0)
        >>> ridge.solve(-5 * one[:1], 0 * one, 0.0)  # (JᵀJ + 1)⁻¹ (10 - 1, -1)
        tensor([ 1.8000, -1.0000], dtype=torch.float64)
    """

    kind = "ridge"

    def __init__(self, jacobian: LinearOperator, space: StepSpace, factors: Tensor, at: Tensor, more: float) -> None:
        super().__init__(len(at))
        self._jacobian, self._space, self._factors, self._at, self._more = jacobian, space, factors, at, more
        self._pull = factors * at

    def moved(self, by: Tensor) -> RidgeLeastSquares:
        """The same at x + ``by`` (n,)."""
        return RidgeLeastSquares(self._jacobian, self._space, self._factors, self._at + by, self._more)

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        total, reduced = damping + self._more, self._space.reduced
        y = -torch.add(coordinates, self._pull, alpha=1 / total)
        none = residuals.new_zeros(reduced.rank)
        if self._space.project is None:
            return y + self._space.vector(reduced.solve(residuals + self._jacobian @ y, none, total))
        rest = y - (self._jacobian.T @ residuals) / total
        u = reduced.solve(residuals, -self._space.project(y), total)
        return rest + self._space.vector(u - self._space.project(rest))

    def image(self, coordinates: Tensor) -> Tensor:
        return self._jacobian @ coordinates

    def dual_norm(self, gradient: Tensor, damping: float) -> float:
        return self._space.reduced.dual_norm(gradient, damping + self._more)

    def vector(self, coordinates: Tensor) -> Tensor:
        """d, (n,)."""
        return coordinates
