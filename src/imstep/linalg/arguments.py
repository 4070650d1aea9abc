"""Checks that all solvers make of their arguments."""

from __future__ import annotations

import math

from torch import Tensor

from imstep.linalg.fitting import check_alike, check_vectors
from imstep.linalg.operator import LinearOperator


def check_vector(operator: LinearOperator, vector: Tensor, solver: str) -> None:
    """Raise unless `vector` is one vector (n,) that the operator can multiply."""
    check_vectors(operator, vector)
    if vector.ndim != 1:
        raise ValueError(
            f"{solver} solves for one vector (n,), got {tuple(vector.shape)}. "
            "Solve column by column, or all together by A.inverse(damping) @ block."
        )


def check_preconditioner(operator: LinearOperator, preconditioner: LinearOperator | None) -> None:
    """Raise unless the preconditioner, if any, multiplies the same vectors as the operator."""
    if preconditioner is not None:
        check_alike(operator, preconditioner)


def check_not_negative(**numbers: float | None) -> None:
    """Raise unless each number is finite and at least 0, or None."""
    for name, value in numbers.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}.")


def check_radius(radius: float) -> None:
    """Raise unless the radius of a trust region is positive and finite."""
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}. Without a bound use conjugate_gradient.")


def check_limit(max_iterations: int | None) -> None:
    """Raise unless the limit on iterations is at least 0, or None."""
    if max_iterations is not None and max_iterations < 0:
        raise ValueError(f"max_iterations must be at least 0, got {max_iterations}.")


class IndefinitePreconditionerError(ValueError):
    """rᵀPr <= 0 for the first residual r: the preconditioner P is not positive definite."""

    def __init__(self, value: float) -> None:
        super().__init__(
            f"the preconditioner is not positive definite: rᵀPr = {value:.3g}. "
            "Pass a symmetric positive definite operator that approximates the inverse, or None."
        )
