"""Direct solvers for small matrices: Cholesky, eigenvalues, the exact trust region."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative, check_radius, check_vector
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.result import KrylovResult, KrylovStatus, measured_result
from imstep.linalg.secular import solve_in_eigenbasis

F64 = torch.float64


class IndefiniteRule(ABC):
    """What stands for the eigenvalues of a matrix that is not positive definite."""

    @abstractmethod
    def replaced(self, values: Tensor) -> Tensor:
        """Positive numbers (n,) in place of the eigenvalues (n,), which ascend and are not all zero."""


@dataclass(frozen=True)
class ShiftedEigenvalues(IndefiniteRule):
    """All eigenvalues raised by the same number, the least one to `least` times the largest magnitude.

    Args:
        least: > 0, at most 1.

    Source: Nocedal & Wright, Numerical Optimization (2nd ed.), section 3.4, "adding a multiple of the identity"; the
    default is our choice.

    Example:
        >>> ShiftedEigenvalues(least=0.25).replaced(torch.tensor([-4.0, 1.0]))
        tensor([1., 6.])
    """

    least: float = 1e-3

    def __post_init__(self) -> None:
        _check_least(self.least)

    def replaced(self, values: Tensor) -> Tensor:
        return values - values[0] + self.least * values.abs().max()


@dataclass(frozen=True)
class AbsoluteEigenvalues(IndefiniteRule):
    """The absolute values of the eigenvalues, at least `least` times the largest: saddle-free Newton.

    Args:
        least: > 0, at most 1.

    Source: Dauphin et al., NeurIPS 2014 (arXiv 1406.2572), section 4; the bound is our choice.

    Example:
        >>> AbsoluteEigenvalues(least=0.25).replaced(torch.tensor([-4.0, 0.0, 2.0]))
        tensor([4., 1., 2.])
    """

    least: float = 1e-6

    def __post_init__(self) -> None:
        _check_least(self.least)

    def replaced(self, values: Tensor) -> Tensor:
        sizes = values.abs()
        return sizes.clamp(min=self.least * float(sizes.max()))


@full_precision
def dense_solve(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    curvature_floor: float = 0.0,
    indefinite: IndefiniteRule | None = None,
    limit: int = 4096,
) -> KrylovResult:
    """Solve (A + λI) x = b by factorising the matrix: for few parameters, or to check another solver.

    Cholesky's factorisation proves the matrix positive definite, then x is the solution. Otherwise it is decomposed,
    A + λI = V diag(θ) Vᵀ, the status says so, and

        x = V diag(1 / θ') Vᵀ b

    with positive θ' by the rule given: still a direction of descent. The arithmetic is float64 whatever A's dtype.

    Args:
        operator: A, self-adjoint, size n.
        rhs: b, (n,); the negative gradient in a Newton method.
        damping: λ >= 0.
        curvature_floor: an eigenvalue of A + λI up to this disturbs, >= 0.
        indefinite: default :class:`ShiftedEigenvalues`.
        limit: largest n that is accepted.

    Returns:
        A `KrylovResult`: CONVERGED, or DISTURBING_NEGATIVE_CURVATURE with the eigenvector of the least eigenvalue as
        disturbing direction, pointing along b, and after a shift with the shift as multiplier.

    Raises:
        TypeError, ValueError: an argument out of range, a vector that does not fit, n > limit.

    Cost: n products, n³/3 operations; 9 n³ or so where the matrix is not definite; 3 n² numbers in float64.

    Source: Nocedal & Wright, Numerical Optimization (2nd ed.), section 3.4.

    Example:
        >>> from imstep.linalg import DenseOperator
        >>> A = DenseOperator(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        >>> result = dense_solve(A, torch.ones(2), indefinite=AbsoluteEigenvalues())
        >>> result.status.name, result.solution, result.disturbing_curvature
        ('DISTURBING_NEGATIVE_CURVATURE', tensor([1.0000, 0.5000]), -2.0)
    """
    check_not_negative(damping=damping, curvature_floor=curvature_floor)
    check_vector(operator, rhs, "dense_solve")
    if not rhs.any():
        return _nowhere(rhs, KrylovStatus.CONVERGED, products=0)
    b, shifted = rhs.detach().to(F64), _shifted(operator, damping, limit)
    if not _finite(b, shifted):
        return _nowhere(rhs, KrylovStatus.NON_FINITE, products=operator.size)
    # Rounding alone must not make a matrix definite.
    margin = max(curvature_floor, operator.size * torch.finfo(F64).eps * float(shifted.abs().max()))
    if int(torch.linalg.cholesky_ex(_raised(shifted, -margin)).info) == 0:
        solution = torch.cholesky_solve(b[:, None], torch.linalg.cholesky(shifted))[:, 0]
        return _result(shifted, b, solution, damping, rhs.dtype, status=KrylovStatus.CONVERGED)
    values, vectors = torch.linalg.eigh(shifted)
    coefficients = vectors.mT @ b
    rule = indefinite or ShiftedEigenvalues()
    raised = rule.replaced(values) if values.any() else torch.ones_like(values)
    shifts = raised - values
    direction = (vectors[:, 0] if coefficients[0] >= 0 else -vectors[:, 0]).to(rhs.dtype)
    return _result(
        shifted,
        b,
        vectors @ (coefficients / raised),
        damping,
        rhs.dtype,
        status=KrylovStatus.DISTURBING_NEGATIVE_CURVATURE,
        disturbing_direction=direction,
        disturbing_image=(float(values[0]) - damping) * direction,
        disturbing_curvature=float(values[0]) - damping,
        multiplier=float(shifts[0]) if torch.allclose(shifts, shifts[0], rtol=1e-12, atol=0) else None,
    )


@full_precision
def dense_trust_region(
    operator: LinearOperator, rhs: Tensor, radius: float, *, damping: float = 0.0, limit: int = 4096
) -> KrylovResult:
    """Maximise bᵀx - xᵀ(A + λI)x/2 over ‖x‖ <= radius exactly, by the eigenvalues of A.

        (A + (λ + μ)I) x = b,   μ >= 0,   μ (radius - ‖x‖) = 0,   A + (λ + μ)I positive semidefinite

    These conditions hold for a global solution and for nothing else. In the hard case, where b has no part along the
    least eigenvalue, an eigenvector is added up to the boundary; also for b = 0.

    Args:
        operator: A, self-adjoint, size n; definite or not.
        rhs: b, (n,); the negative gradient in a Newton method.
        radius: Δ > 0, Euclidean, finite.
        damping: λ >= 0.
        limit: largest n that is accepted.

    Returns:
        A `KrylovResult` with its multiplier μ: CONVERGED inside, with μ = 0, or BOUNDARY.

    Raises:
        TypeError, ValueError: an argument out of range, a vector that does not fit, n > limit.

    Cost: n products, 9 n³ operations or so, 3 n² numbers in float64.

    Source: Moré & Sorensen, SIAM J. Sci. Stat. Comput. 4 (1983); Nocedal & Wright, Numerical Optimization (2nd ed.),
    Theorem 4.1.

    Example:
        >>> from imstep.linalg import DenseOperator
        >>> A = DenseOperator(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        >>> result = dense_trust_region(A, torch.tensor([3.0, 0.0]), radius=2.0)
        >>> result.status.name, result.multiplier, [round(abs(x), 4) for x in result.solution.tolist()]
        ('BOUNDARY', 2.0, [1.0, 1.7321])
    """
    check_not_negative(damping=damping)
    check_radius(radius)
    check_vector(operator, rhs, "dense_trust_region")
    eps = torch.finfo(rhs.dtype).eps
    inside_radius = lambda values, coefficients: solve_in_eigenbasis(values, coefficients, radius, eps)
    result = solve_by_eigenvalues(operator, rhs, damping, limit, inside_radius)
    inside = result.multiplier == 0 and float(result.solution.norm()) < radius
    return result if inside or result.iterations == 0 else replace(result, status=KrylovStatus.BOUNDARY)


def solve_by_eigenvalues(
    operator: LinearOperator,
    rhs: Tensor,
    damping: float,
    limit: int,
    solve: Callable[[Tensor, Tensor], tuple[Tensor, float]],
) -> KrylovResult:
    """x = V y for A + λI = V diag(θ) Vᵀ, where (y, μ) solves the problem of θ and Vᵀb; n products."""
    b, shifted = rhs.detach().to(F64), _shifted(operator, damping, limit)
    if not _finite(b, shifted):
        return _nowhere(rhs, KrylovStatus.NON_FINITE, products=operator.size)
    values, vectors = torch.linalg.eigh(shifted)
    coordinates, multiplier = solve(values.cpu(), (vectors.mT @ b).cpu())
    solution = vectors @ coordinates.to(vectors)
    return _result(shifted, b, solution, damping, rhs.dtype, status=KrylovStatus.CONVERGED, multiplier=multiplier)


def _check_least(least: float) -> None:
    if not 0 < least <= 1:
        raise ValueError(f"least, relative to the largest eigenvalue, must lie in (0, 1], got {least}.")


def _shifted(operator: LinearOperator, damping: float, limit: int) -> Tensor:
    """A + λI in float64, made symmetric."""
    matrix = operator.to_dense(limit=limit).detach().to(F64)
    return _raised((matrix + matrix.mT) / 2, damping)


def _raised(matrix: Tensor, shift: float) -> Tensor:
    return matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _nowhere(rhs: Tensor, status: KrylovStatus, products: int) -> KrylovResult:
    zero = torch.zeros_like(rhs)
    return measured_result(
        0.0,
        zero,
        zero.clone(),
        status=status,
        iterations=0,
        products=products,
        residual_norm=float(rhs.norm()),
        decreases=(0.0,),
    )


def _result(
    shifted: Tensor, b: Tensor, solution: Tensor, damping: float, dtype: torch.dtype, **outcome: Any
) -> KrylovResult:
    """The result at x, measured in float64."""
    image = shifted @ solution
    residual = b - image - (outcome.get("multiplier") or 0.0) * solution
    return measured_result(
        damping,
        solution.to(dtype),
        (image - damping * solution).to(dtype),
        iterations=1,
        products=len(b),
        residual_norm=float(residual.norm()),
        decreases=(0.0, float(b @ solution - solution @ image / 2)),
        **outcome,
    )
