"""The method of minimal residuals, for systems that need not be definite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from imstep.linalg.arguments import check_limit, check_not_negative, check_preconditioner, check_vector
from imstep.linalg.dots import unit_of
from imstep.linalg.minres_system import MinresState, NullWatch, Probe, ShiftedSystem
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.result import KrylovResult, KrylovStatus, measured_result
from imstep.linalg.stopping import Progress, RelativeResidual, StoppingRule, first_answer


@full_precision
def minres(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: LinearOperator | None = None,
    stopping: Sequence[StoppingRule] = (RelativeResidual(1e-5),),
    max_iterations: int | None = None,
    curvature_floor: float | None = None,
    x0: Tensor | None = None,
) -> KrylovResult:
    """Solve (A + λI) x = b for a symmetric A, indefinite or singular as it may be, by minimising the residual.

        x_k = argmin ‖b - (A + λI) x‖_P over x₀ + P K_k,   K_k = span{r₀, (A + λI) P r₀, ...},   ‖r‖²_P = rᵀPr

    ‖r‖_P never grows. For a definite A the iterates gain less than CG's, but leave smaller residuals; and the
    curvature of the residual's direction p = P r is known before x moves, without a product of its own. With a
    `curvature_floor` the solve ends by the first p with pᵀ(A + λI)p <= curvature_floor · pᵀp, or one that has none to
    the root of rounding. Until then bᵀx, ‖x‖ and the model's decrease grow with every iterate from zero, so that each
    is a direction of descent.

    Without a floor it also ends, with status LEAST_SQUARES, where A + λI takes p to zero up to the root of rounding,
    and 20 more iterations do not get past it: then x minimises ‖r‖_P. From a zero start it is the shortest such x in
    the norm of P⁻¹ (without P the pseudo-inverse solution), unless rounding keeps the null space from being told; this
    costs one more product.

    Args:
        operator: A, self-adjoint, size n.
        rhs: b, (n,).
        damping: λ >= 0. For a shift of the other sign add a multiple of the identity to the operator.
        preconditioner: P, symmetric positive definite, applied to residuals: P ≈ |A + λI|⁻¹. It changes the path to
            the solution only, where there is one.
        stopping: rules asked after every iteration, in this order; their residual norm is Euclidean.
        max_iterations: at least 0; default 10 n.
        curvature_floor: smallest trusted curvature per pᵀp, >= 0; None to solve through negative curvature.
        x0: start, (n,); costs a product. Default zero.

    Returns:
        A `KrylovResult`; status LEAST_SQUARES where the system has no solution. Non-finite numbers are a status,
        never an exception.

    Raises:
        TypeError: a vector of another dtype.
        ValueError: an argument out of range, a vector of another shape, a preconditioner that is not positive
            definite.

    Cost: one product per iteration; 10 vectors of size n while it runs, 11 with a preconditioner; up to 8 more while it
    waits for what might be a null vector.

    Source: Paige & Saunders, SIAM J. Numer. Anal. 12 (1975), 617-629; curvature of the residuals and monotonicity: Liu
    & Roosta, SIAM J. Optim. 32 (2022), arXiv 2206.05732; the shortest x: Liu, Milzarek & Roosta, arXiv 2309.17096. The
    level at which a vector counts as null is our choice.

    Example:
        >>> import torch
        >>> from imstep.linalg import DenseOperator
        >>> A = DenseOperator(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        >>> result = minres(A, torch.tensor([3.0, 2.0]))
        >>> result.status.name, result.products, [round(x, 4) for x in result.solution.tolist()]
        ('CONVERGED', 2, [3.0, -1.0])
        >>> result = minres(A, torch.tensor([0.0, 1.0]), curvature_floor=0.0)
        >>> result.status.name, result.disturbing_curvature
        ('DISTURBING_NEGATIVE_CURVATURE', -2.0)
    """
    check_not_negative(damping=damping, curvature_floor=curvature_floor)
    check_limit(max_iterations)
    for vector in (rhs, rhs if x0 is None else x0):
        check_vector(operator, vector, "minres")
    check_preconditioner(operator, preconditioner)
    system = ShiftedSystem(operator, rhs.detach(), damping, preconditioner, curvature_floor)
    limit = 10 * operator.size if max_iterations is None else max_iterations
    state, status = system.start(x0)
    probe, watch = None, NullWatch(system.null_level)
    while status is None and (status := _ending(system, state, stopping, limit)) is None:
        probe = system.probe(state)
        state = replace(state, products=state.products + 1)
        status = system.disturbance(state, probe)
        if status is None and curvature_floor is None:
            watch = watch.after(state, probe)
            status = KrylovStatus.LEAST_SQUARES if watch.certain(state, system.rounding) else None
        if status is None:
            state, status = system.advance(state, probe)
        if status is KrylovStatus.LEAST_SQUARES:
            state = system.shortened(replace(watch.closest or state, products=state.products))
    return _result(system, state, status, probe)


def _ending(
    system: ShiftedSystem, state: MinresState, stopping: Sequence[StoppingRule], limit: int
) -> KrylovStatus | None:
    # Below rounding level of b the recurrence for r no longer says anything about b - (A + λI)x.
    if state.residual_norm <= system.rounding * system.rhs_norm:
        return KrylovStatus.CONVERGED
    progress = Progress(state.products, state.residual_norm, system.rhs_norm, state.decreases)
    return first_answer(stopping, progress, limit)


def _result(system: ShiftedSystem, state: MinresState, status: KrylovStatus, probe: Probe | None) -> KrylovResult:
    image = system.rhs - state.residual
    if system.damping > 0:
        image.sub_(state.solution, alpha=system.damping)
    disturbing = probe if status.disturbing else None
    unit = 1.0 if disturbing is None else unit_of(disturbing.direction)  # or A p may leave the range of the dtype
    return measured_result(
        system.damping,
        state.solution,
        image,
        status=status,
        iterations=state.iteration,
        products=state.products,
        residual_norm=state.residual_norm,
        decreases=state.decreases,
        disturbing_direction=None if disturbing is None else unit * disturbing.direction,
        disturbing_image=None if disturbing is None else system.image_of(state, disturbing, unit),
        disturbing_curvature=None if disturbing is None else unit**2 * disturbing.curvature,
    )
