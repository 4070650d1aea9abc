"""The trust-region subproblem by truncated conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from imstep.linalg.cg import conjugate_gradient
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.result import KrylovResult
from imstep.linalg.stopping import RelativeResidual, StoppingRule


@full_precision
def steihaug_toint(
    operator: LinearOperator,
    rhs: Tensor,
    radius: float,
    *,
    damping: float = 0.0,
    preconditioner: LinearOperator | None = None,
    stopping: Sequence[StoppingRule] = (RelativeResidual(1e-5),),
    max_iterations: int | None = None,
) -> KrylovResult:
    """Maximise bᵀx - xᵀ(A + λI)x/2 over ‖x‖ <= radius roughly: at least the decrease of the Cauchy point.

    Conjugate gradients from zero, until an iterate would leave the ball or a direction has negative curvature; the last
    direction is then followed to the boundary. For a definite A without preconditioner the decrease is at least half
    of the best possible (Yuan, 2000); :func:`gltr` goes on along the boundary.

    Args:
        operator: A, self-adjoint, size n; definite or not.
        rhs: b, (n,); the negative gradient in a Newton method.
        radius: Δ > 0. Euclidean, also with a preconditioner; ‖x‖ then need not grow from iterate to iterate, and
            the first crossing ends the solve.
        damping: λ >= 0.
        preconditioner: symmetric positive definite P ≈ (A + λI)⁻¹.
        stopping: rules asked after every iteration, in this order.
        max_iterations: at least 0; default 10 n.

    Returns:
        The `KrylovResult` of :func:`conjugate_gradient`: BOUNDARY, or DISTURBING_NEGATIVE_CURVATURE with x on the
        boundary as well.

    Raises:
        TypeError, ValueError: as :func:`conjugate_gradient`.

    Cost: one product per iteration; 9 vectors of size n.

    Source: Steihaug, SIAM J. Numer. Anal. 20 (1983); Toint (1981); Conn, Gould & Toint, Trust-Region Methods (2000),
    Algorithm 7.5.1, with the Euclidean norm.

    Example:
        >>> import torch
        >>> from imstep.linalg import DiagonalOperator
        >>> result = steihaug_toint(DiagonalOperator(torch.tensor([1.0, -1.0])), torch.tensor([0.0, 1.0]), radius=2.0)
        >>> result.status.name, result.solution
        ('DISTURBING_NEGATIVE_CURVATURE', tensor([0., 2.]))
    """
    return conjugate_gradient(
        operator,
        rhs,
        damping=damping,
        preconditioner=preconditioner,
        stopping=stopping,
        max_iterations=max_iterations,
        radius=radius,
    )
