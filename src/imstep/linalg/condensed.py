"""Damped least squares with a Jacobian by those with fewer rows that have the same products."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from imstep.linalg.gram import Rotation
from imstep.linalg.gram_factorisation import StepSpace
from imstep.linalg.reduced import DampedLeastSquares


class CondensedLeastSquares(DampedLeastSquares):
    """Damped least squares with J = Q B from those with B: ‖ρ + Q B d‖² = ‖Qᵀρ + B d‖² + ‖ρ - Q Qᵀρ‖².

    Args:
        of: with B.
        rotation: Q.

    Cost: that of ``of``, and a product with Q or Qᵀ for each image or solution.

    Source: sums of squares over processes, Demmel, Grigori, Hoemmen and Langou, SIAM J. Sci. Comput. 34 (2012),
        A206-A239: the first level of parallel TSQR.
    """

    def __init__(self, of: DampedLeastSquares, rotation: Rotation) -> None:
        super().__init__(of.rank)
        self.kind = of.kind
        self._of, self._rotation = of, rotation

    def solve(self, residuals: Tensor, coordinates: Tensor, damping: float) -> Tensor:
        return self._of.solve(self._rotation.project(residuals), coordinates, damping)

    def image(self, coordinates: Tensor) -> Tensor:
        return self._rotation.lift(self._of.image(coordinates))

    def inner(self, first: Tensor, second: Tensor) -> Tensor:
        return self._of.inner(first, second)

    def project(self, coordinates: Tensor) -> Tensor:
        return self._of.project(coordinates)

    def dual_norm(self, gradient: Tensor, damping: float) -> float:
        return self._of.dual_norm(gradient, damping)

    def norm(self, coordinates: Tensor) -> float:
        return self._of.norm(coordinates)


def in_all_rows(space: StepSpace, rotation: Rotation | None) -> StepSpace:
    """The steps of a matrix from those of its condensed rows; None where these are all."""
    return space if rotation is None else replace(space, reduced=CondensedLeastSquares(space.reduced, rotation))
