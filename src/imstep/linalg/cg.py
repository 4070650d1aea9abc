"""The method of conjugate gradients, ended by the first direction whose curvature must not be trusted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from imstep.linalg.arguments import check_limit, check_not_negative, check_preconditioner, check_vector
from imstep.linalg.cg_system import CGState, DampedSystem, Probe
from imstep.linalg.halved import HalvedOperator, NoiseTest
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.result import KrylovResult, KrylovStatus, measured_result
from imstep.linalg.stopping import Progress, RelativeResidual, StoppingRule, first_answer


@full_precision
def conjugate_gradient(
    operator: LinearOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: LinearOperator | None = None,
    stopping: Sequence[StoppingRule] = (RelativeResidual(1e-5),),
    max_iterations: int | None = None,
    curvature_floor: float = 0.0,
    noise: NoiseTest | None = None,
    radius: float | None = None,
    x0: Tensor | None = None,
    recompute_residual_every: int | None = None,
    keep_pairs: int = 0,
    keep_iterates: float | None = None,
) -> KrylovResult:
    """Solve (A + λI) x = b, equivalently maximise bᵀx - xᵀ(A + λI)x/2, as far as A can be trusted.

    With r = b - (A + λI)x and z = P r, each iteration makes the one product A p and moves by

        c = pᵀAp + λ pᵀp,   a = rᵀz / c,   x += a p,   r -= a (A p + λ p),   p <- z' + (r'ᵀz' / rᵀz) p.

    A search direction *disturbs*, and ends the solve before x moves along it, if
    (a) c <= curvature_floor · pᵀp, or c is below the rounding error of its own inner product; or
    (b) `noise` finds the curvatures of the two halves of the batch, damping included, within noise of zero.
    Every iterate from zero before that has bᵀx > 0, a direction of descent, and can be used as it is. If the
    first direction disturbs, the solution is the start, and the result holds the direction and its curvature.

    Args:
        operator: A, self-adjoint, size n; definite or not.
        rhs: b, (n,); the negative gradient in a Newton method.
        damping: λ >= 0.
        preconditioner: P, symmetric positive definite, applied to residuals: P ≈ (A + λI)⁻¹. It changes the
            path to the solution only: the residual norm, the curvature test and the radius stay Euclidean.
        stopping: rules asked after every iteration, in this order.
        max_iterations: at least 0; default 10 n, as in SciPy.
        curvature_floor: smallest trusted curvature per pᵀp, >= 0.
        noise: needs a `HalvedOperator`; None switches test (b) off.
        radius: Δ > 0, bound on ‖x‖. The solve ends on the boundary when an iterate would cross it, and
            follows a direction of negative curvature, though not a noisy one, to the boundary.
        x0: start, (n,), inside the radius; costs a product. Default zero.
        keep_pairs: how many of the last directions and their images to return, >= 0; two vectors each.
        keep_iterates: growth > 1: return the iterates ⌈growth^j⌉, j = 0, 1, ..., before the last; two vectors each.
        recompute_residual_every: replace the recurrence for r by b - (A + λI)x after so many iterations, at
            one product each; worth it for many hundreds of iterations in float32.

    Returns:
        A `KrylovResult`. Non-finite numbers are a status, never an exception.

    Raises:
        TypeError: `noise` without a HalvedOperator; a vector of another dtype.
        ValueError: an argument out of range, a vector of another shape, a preconditioner that is not positive
            definite.

    Cost: one product and one application of the preconditioner per iteration; 9 vectors of size n while it runs.

    Source: Nocedal & Wright, Numerical Optimization (2nd ed.), Algorithms 5.3 and 7.1 (CG, Newton-CG); with a
    radius Algorithm 7.2 (Steihaug, SIAM J. Numer. Anal. 20, 1983). The definition of a disturbing direction
    is our choice.

    Example:
        >>> import torch
        >>> from imstep.linalg import DenseOperator
        >>> A = DenseOperator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]))
        >>> result = conjugate_gradient(A, torch.tensor([1.0, 2.0]))
        >>> result.status.name, result.products, [round(x, 4) for x in result.solution.tolist()]
        ('CONVERGED', 2, [0.0909, 0.6364])
        >>> saddle = DenseOperator(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        >>> result = conjugate_gradient(saddle, torch.tensor([0.0, 1.0]))
        >>> result.status.name, result.disturbing_curvature
        ('DISTURBING_NEGATIVE_CURVATURE', -2.0)
    """
    check_not_negative(damping=damping, curvature_floor=curvature_floor, keep_pairs=keep_pairs)
    check_limit(max_iterations)
    if keep_iterates is not None and not 1 < keep_iterates < math.inf:
        raise ValueError(f"keep_iterates, the growth of intervals, is above 1, or None; got {keep_iterates}.")
    _check_arguments(operator, rhs, x0, preconditioner, noise, radius, recompute_residual_every)
    system = DampedSystem(
        operator,
        rhs.detach(),
        damping,
        preconditioner,
        curvature_floor,
        noise,
        radius,
        recompute_residual_every,
    )
    limit = 10 * operator.size if max_iterations is None else max_iterations
    state, status = system.start(x0)
    probe = None
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=keep_pairs)
    iterates, power = [], 0
    while status is None and (status := _ending(system, state, stopping, limit)) is None:
        state, status = system.aim(state)
        if status is not None:
            break
        if keep_iterates is not None and state.iteration >= math.ceil(keep_iterates**power):
            iterates.append((state.solution, state.image))
            power = math.floor(math.log(state.iteration) / math.log(keep_iterates)) + 1
        probe = system.probe(state.direction)
        state = replace(state, products=state.products + 1)
        pairs.append((probe.direction, probe.image))
        status = system.disturbance(probe)
        if status is None:
            state, status = system.advance(state, probe)
        elif status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE and radius is not None:
            state = system.move_to_boundary(state, probe)
    kept = tuple(pair for pair in iterates if pair[0] is not state.solution)
    return replace(_result(system, state, status, probe), pairs=tuple(pairs), iterates=kept)


def _ending(
    system: DampedSystem, state: CGState, stopping: Sequence[StoppingRule], limit: int
) -> KrylovStatus | None:
    # Below rounding level of b the recurrence for r no longer says anything about b - (A + λI)x.
    if state.residual_norm <= system.rounding * system.rhs_norm:
        return KrylovStatus.CONVERGED
    progress = Progress(state.products, state.residual_norm, system.rhs_norm, state.decreases)
    return first_answer(stopping, progress, limit)


def _result(system: DampedSystem, state: CGState, status: KrylovStatus, probe: Probe | None) -> KrylovResult:
    disturbing = probe if status.disturbing else None
    return measured_result(
        system.damping,
        state.solution,
        state.image,
        status=status,
        iterations=state.iteration,
        products=state.products,
        residual_norm=state.residual_norm,
        decreases=state.decreases,
        disturbing_direction=None if disturbing is None else disturbing.direction,
        disturbing_image=None if disturbing is None else disturbing.image,
        disturbing_curvature=None if disturbing is None else disturbing.curvature,
    )


def _check_arguments(
    operator: LinearOperator,
    rhs: Tensor,
    x0: Tensor | None,
    preconditioner: LinearOperator | None,
    noise: NoiseTest | None,
    radius: float | None,
    refresh: int | None,
) -> None:
    for vector in (rhs, rhs if x0 is None else x0):
        check_vector(operator, vector, "conjugate_gradient")
    check_preconditioner(operator, preconditioner)
    if radius is not None and not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}. For no bound pass radius=None.")
    if refresh is not None and refresh < 1:
        raise ValueError(f"recompute_residual_every must be at least 1, got {refresh}. For never pass None.")
    if noise is not None and not isinstance(operator, HalvedOperator):
        raise TypeError(
            "the noise test compares the two halves of a batch, but "
            f"{type(operator).__name__} has no halves. "
            "Pass a HalvedOperator such as SplitOperator(first, second), or noise=None."
        )
