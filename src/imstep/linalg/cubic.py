"""The cubic subproblem: a quadratic model that pays for its length by the third power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative, check_vector
from imstep.linalg.dense import solve_by_eigenvalues
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.projected import Cubic, solve_by_projections
from imstep.linalg.result import KrylovResult
from imstep.linalg.secular import solve_cubic_in_eigenbasis
from imstep.linalg.stopping import RelativeResidual, StoppingRule


@full_precision
def cubic_regularization(
    operator: LinearOperator,
    rhs: Tensor,
    sigma: float,
    *,
    damping: float = 0.0,
    preconditioner: LinearOperator | None = None,
    stopping: Sequence[StoppingRule] = (RelativeResidual(1e-5),),
    max_iterations: int | None = None,
    basis_limit: int = 32,
    generator: torch.Generator | None = None,
    probes: int = 32,
) -> KrylovResult:
    """Maximise bᵀx - xᵀ(A + λI)x/2 - σ‖x‖³/3 by products only.

    As :func:`~imstep.linalg.gltr`: the problem is solved exactly over a growing space V of residuals, without P the
    Krylov space of Lanczos' method.

        x = V h,   (VᵀAV + (λ + μ)I) h = Vᵀb,   μ = σ‖h‖,   r = b - (A + (λ + μ)I) x,   V <- [V, P r]

    Args:
        operator: A, self-adjoint, size n; definite or not.
        rhs: b, (n,); the negative gradient in a Newton method.
        sigma: σ > 0, finite.
        damping: λ >= 0.
        preconditioner: P, symmetric positive definite; it changes the path only.
        stopping: rules asked after every iteration; residuals count relative to max(‖b‖, μ‖x‖).
        max_iterations: at least 0; default 10 n.
        basis_limit: vectors kept of V, >= 6, and as many of A V.
        generator: draws a random vector from which curvature below -μ is looked for, where b has no part in it (the
            hard case); None to trust the residual.
        probes: products spent on that search, at most; >= 1.

    Returns:
        A `KrylovResult` with its multiplier μ = σ‖x‖; its decreases are those of what is maximised.

    Raises:
        TypeError, ValueError: an argument out of range, a vector that does not fit, a preconditioner that is not
            positive definite.

    Cost: that of `gltr`: one product per iteration.

    Source: Cartis, Gould and Toint, Mathematical Programming 127 (2011), 245-295, section 6.

    Example:
        >>> import torch
        >>> from imstep.linalg import DiagonalOperator
        >>> A, b = DiagonalOperator(torch.tensor([-1.0, 1.0])), torch.tensor([2.0, 0.0])
        >>> result = cubic_regularization(A, b, sigma=1.0)  # (-1 + x) x = 2
        >>> result.status.name, round(float(result.solution[0]), 5), round(result.multiplier, 5)
        ('CONVERGED', 2.0, 2.0)
    """
    _check(operator, rhs, sigma, damping)
    problem = Cubic(operator, rhs.detach(), damping, preconditioner, sigma)
    return solve_by_projections(problem, stopping, max_iterations, basis_limit, generator, probes)


@full_precision
def dense_cubic_regularization(
    operator: LinearOperator, rhs: Tensor, sigma: float, *, damping: float = 0.0, limit: int = 4096
) -> KrylovResult:
    """Maximise bᵀx - xᵀ(A + λI)x/2 - σ‖x‖³/3 exactly, by the eigenvalues of A.

        (A + (λ + μ)I) x = b,   μ = σ‖x‖,   A + (λ + μ)I positive semidefinite

    These conditions hold for a global solution and for nothing else.

    Args:
        operator: A, self-adjoint, size n; definite or not.
        rhs: b, (n,); the negative gradient in a Newton method.
        sigma: σ > 0, finite.
        damping: λ >= 0.
        limit: largest n that is accepted.

    Returns:
        A `KrylovResult` with its multiplier μ.

    Raises:
        TypeError, ValueError: an argument out of range, a vector that does not fit, n > limit.

    Cost: n products, 9 n³ operations or so, 3 n² numbers in float64.

    Source: Nesterov and Polyak, Mathematical Programming 108 (2006), 177-205, section 5; Cartis, Gould and Toint,
        Mathematical Programming 127 (2011), Theorem 3.1.

    Example:
        >>> import torch
        >>> from imstep.linalg import DenseOperator
        >>> A = DenseOperator(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        >>> result = dense_cubic_regularization(A, torch.zeros(2), sigma=0.5)  # ‖x‖ = 2/σ along the negative curvature
        >>> [round(abs(x), 4) for x in result.solution.tolist()], round(result.multiplier, 4)
        ([0.0, 4.0], 2.0)
    """
    _check(operator, rhs, sigma, damping)
    eps = torch.finfo(rhs.dtype).eps
    held_back = lambda values, coefficients: solve_cubic_in_eigenbasis(values, coefficients, sigma, eps)
    result = solve_by_eigenvalues(operator, rhs, damping, limit, held_back)
    held = result.damped_decrease - sigma * float(result.solution.norm()) ** 3 / 3
    return replace(result, decreases=(*result.decreases[:-1], held))


def _check(operator: LinearOperator, rhs: Tensor, sigma: float, damping: float) -> None:
    check_not_negative(damping=damping)
    check_vector(operator, rhs, "cubic_regularization")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma, the weight of the cubic term, must be positive and finite, got {sigma}.")
