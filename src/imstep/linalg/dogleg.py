"""Trust-region steps in the plane of the gradient and Newton's direction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative, check_preconditioner, check_radius, check_vector
from imstep.linalg.cg import conjugate_gradient
from imstep.linalg.dots import dots
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.projected import TrustRegion
from imstep.linalg.result import KrylovResult, KrylovStatus, measured_result
from imstep.linalg.stopping import RelativeResidual, StoppingRule
from imstep.linalg.subspace import Subspace


@full_precision
def two_dimensional_subspace(
    operator: LinearOperator,
    rhs: Tensor,
    radius: float,
    *,
    damping: float = 0.0,
    preconditioner: LinearOperator | None = None,
    stopping: Sequence[StoppingRule] = (RelativeResidual(1e-5),),
) -> KrylovResult:
    """Maximise bᵀx - xᵀ(A + λI)x/2 over ‖x‖ <= radius in the space of b and the solution by conjugate gradients.

    Where these meet a direction of negative curvature it is the third of the space.

    Args:
        operator: A, self-adjoint, size n; definite or not.
        rhs: b, (n,); the negative gradient in a Newton method.
        radius: Δ > 0, Euclidean, finite.
        damping: λ >= 0.
        preconditioner: P, symmetric positive definite, of the conjugate gradients.
        stopping: rules that end them.

    Returns:
        A `KrylovResult` with its multiplier μ: BOUNDARY, or why the conjugate gradients ended.

    Raises:
        TypeError, ValueError: an argument out of range, a vector that does not fit, a preconditioner that is not
            positive definite.

    Cost: that of the conjugate gradients and at most three products.

    Source: Byrd, Schnabel and Shultz, Mathematical Programming 40 (1988), 247-263; the third direction is our choice.

    Example:
        >>> import torch
        >>> from imstep.linalg import DiagonalOperator
        >>> A, b = DiagonalOperator(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 4.0])
        >>> two_dimensional_subspace(A, b, radius=5.0).solution
        tensor([1.0000, 1.0000])
        >>> round(float(two_dimensional_subspace(A, b, radius=1.0).solution.norm()), 5)
        1.0
    """
    found = _newton(operator, rhs, radius, damping, preconditioner, stopping)
    return _in_space(operator, rhs, radius, damping, found)


@full_precision
def dogleg(
    operator: LinearOperator,
    rhs: Tensor,
    radius: float,
    *,
    damping: float = 0.0,
    preconditioner: LinearOperator | None = None,
    stopping: Sequence[StoppingRule] = (RelativeResidual(1e-5),),
) -> KrylovResult:
    """As far as ‖x‖ <= radius lets it along the path from 0 to the steepest descent's minimiser and on to Newton's.

        x_U = (bᵀb / bᵀ(A + λI)b) b,   x_N ≈ (A + λI)⁻¹ b,   x = x_U + τ (x_N - x_U),   0 <= τ <= 1

    or the part of x_U that ends on the boundary. The path is meant for matrices that are positive definite; where the
    conjugate gradients that make x_N meet negative curvature, the step is that of :func:`two_dimensional_subspace`.

    Args, returns, raises: as there.

    Cost: that of the conjugate gradients and a product.

    Source: Powell (1970); Nocedal and Wright, Numerical Optimization (2nd ed.), section 4.1.

    Example:
        >>> import torch
        >>> from imstep.linalg import DiagonalOperator
        >>> A, b = DiagonalOperator(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 4.0])
        >>> result = dogleg(A, b, radius=1.2)
        >>> result.status.name, round(float(result.solution.norm()), 5)
        ('BOUNDARY', 1.2)
    """
    found = _newton(operator, rhs, radius, damping, preconditioner, stopping)
    if found.status.disturbing:
        return _in_space(operator, rhs, radius, damping, found)
    b, full, image = rhs.detach(), found.solution, found.image
    if not math.isfinite(found.residual_norm) or float(full.norm()) <= radius:
        return found
    steepest = operator.matvec(b)
    bb, bAb = dots((b, b), (b, steepest))
    share = min(bb / (bAb + damping * bb), radius / math.sqrt(bb))
    start, start_image = share * b, share * steepest
    along = full - start
    aa, sa, ss = dots((along, along), (start, along), (start, start))
    missing = max(radius * radius - ss, 0.0)
    # The positive root of ‖x_U + τ a‖ = Δ, written without cancellation for either sign of sa.
    root = math.sqrt(sa * sa + aa * missing)
    tau = missing / (sa + root) if sa > 0 else (root - sa) / aa
    solution = torch.add(start, along, alpha=tau)
    product = torch.add(start_image, image - start_image, alpha=tau)
    residual = b - product - damping * solution
    bx, xx, xAx, rr = dots((b, solution), (solution, solution), (solution, product), (residual, residual))
    return measured_result(
        damping,
        solution,
        product,
        status=KrylovStatus.BOUNDARY,
        iterations=found.iterations,
        products=found.products + 1,
        residual_norm=math.sqrt(rr),
        decreases=(0.0, bx - (xAx + damping * xx) / 2),
    )


def _newton(
    operator: LinearOperator,
    rhs: Tensor,
    radius: float,
    damping: float,
    preconditioner: LinearOperator | None,
    stopping: Sequence[StoppingRule],
) -> KrylovResult:
    check_not_negative(damping=damping)
    check_radius(radius)
    check_vector(operator, rhs, "dogleg")
    check_preconditioner(operator, preconditioner)
    return conjugate_gradient(operator, rhs, damping=damping, preconditioner=preconditioner, stopping=stopping)


def _in_space(
    operator: LinearOperator, rhs: Tensor, radius: float, damping: float, found: KrylovResult
) -> KrylovResult:
    """The solution over the space of b and what conjugate gradients have found."""
    space = Subspace(operator, min(3, operator.size))
    for vector in (rhs.detach(), found.solution, found.disturbing_direction):
        unit = None if vector is None or space.full else space.direction(vector)
        if unit is not None and not space.add(unit):
            return found
    problem = TrustRegion(operator, rhs.detach(), damping, None, radius)
    point = problem.solve(space)
    return measured_result(
        damping,
        point.solution,
        point.image,
        status=KrylovStatus.BOUNDARY if problem.bounds(point) else found.status,
        iterations=found.iterations,
        products=found.products + space.products,
        residual_norm=point.residual_norm,
        decreases=(0.0, point.decrease),
        multiplier=point.multiplier,
    )
