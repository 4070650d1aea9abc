"""The trust-region subproblem over a growing Krylov space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative, check_radius, check_vector
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.projected import TrustRegion, solve_by_projections
from imstep.linalg.result import KrylovResult
from imstep.linalg.stopping import RelativeResidual, StoppingRule


@full_precision
def gltr(
    operator: LinearOperator,
    rhs: Tensor,
    radius: float,
    *,
    damping: float = 0.0,
    preconditioner: LinearOperator | None = None,
    stopping: Sequence[StoppingRule] = (RelativeResidual(1e-5),),
    max_iterations: int | None = None,
    basis_limit: int = 32,
    generator: torch.Generator | None = None,
    probes: int = 32,
) -> KrylovResult:
    """Maximise bᵀx - xᵀ(A + λI)x/2 over ‖x‖ <= radius, also along the boundary, by products only.

    Each iteration solves the problem exactly over a space spanned by orthonormal V, and adds to the space the residual
    of the whole problem, preconditioned:

        x = V h,   (VᵀAV + (λ + μ)I) h = Vᵀb,   ‖h‖ <= radius,   r = b - (A + (λ + μ)I) x,   V <- [V, P r]

    Without P this is the Krylov space of Lanczos' method, and x the iterate of GLTR; inside the ball it is that of
    conjugate gradients, with P of preconditioned ones. P changes the path only: radius and residual are Euclidean. The
    products A V are kept, so that a space that has become too large is reduced, without a product, to the last two
    iterates and at most two Ritz vectors of negative curvature. Solves of many times `basis_limit` products need up to
    twice as many for it.

    A residual of zero does not prove x a global solution: b may have no part in a direction of curvature below -μ (the
    hard case). With a `generator` the least eigenvalue is then looked for from a random vector; if it is below -μ its
    vector joins the space, and the iteration goes on.

    Args:
        operator: A, self-adjoint, size n; definite or not.
        rhs: b, (n,); the negative gradient in a Newton method.
        radius: Δ > 0, Euclidean, finite.
        damping: λ >= 0.
        preconditioner: P, symmetric positive definite, for instance ≈ (A + λI)⁻¹.
        stopping: rules asked after every iteration, in this order; residuals count relative to max(‖b‖, μΔ).
        max_iterations: at least 0; default 10 n.
        basis_limit: vectors kept of V, >= 6, and as many of A V.
        generator: draws the random vector, on its own device; None to trust the residual.
        probes: products spent on that search, at most, and vectors kept for it; >= 1.

    Returns:
        A `KrylovResult` with its multiplier μ: CONVERGED inside, BOUNDARY where the solution lies on the boundary; or
        the status of a stopping rule, with the best x of the space.

    Raises:
        TypeError, ValueError: an argument out of range, a vector that does not fit, a preconditioner that is not
            positive definite.

    Cost: one product per iteration; 2 k + 5 vectors of size n with k <= basis_limit, 10 n k operations and an
    eigenvalue problem of size k per iteration.

    Source: Gould, Lucidi, Roma & Toint, SIAM J. Optim. 9 (1999), 504-525; keeping the products, preconditioning the
    residual and restarting as Hager, SIAM J. Optim. 12 (2001), 188-208, and Erway, Gill & Griffin, SIAM J. Optim. 20
    (2009), 1110-1131; which vectors are kept, and the random probe, are our choice.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> A, b = DiagonalOperator(torch.tensor([-2.0, 1.0, 3.0])), torch.tensor([0.0, 3.0, 0.0])
        >>> result = gltr(A, b, radius=2.0)
        >>> result.status.name, result.products, round(result.multiplier, 4), result.predicted_decrease
        ('BOUNDARY', 1, 0.5, 4.0)
        >>> result = gltr(A, b, radius=2.0, generator=torch.Generator().manual_seed(0))
        >>> result.status.name, result.products, round(result.multiplier, 4), round(result.predicted_decrease, 4)
        ('BOUNDARY', 5, 2.0, 5.5)
    """
    check_not_negative(damping=damping)
    check_radius(radius)
    check_vector(operator, rhs, "gltr")
    problem = TrustRegion(operator, rhs.detach(), damping, preconditioner, radius)
    return solve_by_projections(problem, stopping, max_iterations, basis_limit, generator, probes)
