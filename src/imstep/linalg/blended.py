"""Conjugate gradients on a blend of the matrix and of what the preconditioner approximates."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imstep.linalg.arguments import (
    IndefinitePreconditionerError,
    check_not_negative,
    check_preconditioner,
    check_vector,
)
from imstep.linalg.dots import dots
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.result import KrylovResult, KrylovStatus
from imstep.linalg.stopping import Progress, RelativeResidual, StoppingRule, first_answer


@full_precision
def blended_conjugate_gradient(
    operator: LinearOperator,
    rhs: Tensor,
    preconditioner: LinearOperator,
    *,
    weight: float,
    damping: float = 0.0,
    stopping: Sequence[StoppingRule] = (RelativeResidual(1e-5),),
    keep_pairs: int = 0,
) -> KrylovResult:
    """Solve (1-w)(A + λI) x + w P⁻¹ x = b, where only P is known and only A costs.

    Where A is the curvature of one mini-batch and P⁻¹ a running average over many, the blend keeps the solution from
    fitting the batch. P⁻¹p follows the recurrence of the directions p, since these are sums of vectors P r:

        c = (1-w)(pᵀAp + λ pᵀp) + w pᵀP⁻¹p,   p <- P r + β p,   P⁻¹p <- r + β P⁻¹p

    A direction with c <= 0 ends the solve before x moves along it.

    Args:
        operator: A, self-adjoint, size n; definite or not.
        rhs: b, (n,).
        preconditioner: P, symmetric positive definite.
        weight: w in [0, 1); 0 gives preconditioned conjugate gradients.
        damping: λ >= 0.
        stopping: rules asked after every iteration, in this order; their decreases are those of the blend.
        keep_pairs: how many of the last directions and their images A p to return, >= 0.

    Returns:
        A `KrylovResult`; its image, curvature and predicted decreases are of A alone.

    Raises:
        TypeError: a vector of another dtype.
        ValueError: an argument out of range, a vector of another shape, a preconditioner that is not positive
            definite.

    Cost: one product per iteration; 9 vectors of size n while it runs.

    Source: our choice; Levenberg-Marquardt damping in the metric of P⁻¹, Nocedal & Wright, Numerical Optimization (2nd
    ed.), section 10.3 on scaled problems.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> A, P = DiagonalOperator(torch.tensor([1.0, 3.0])), DiagonalOperator(torch.tensor([1.0, 1.0]))
        >>> x = blended_conjugate_gradient(A, torch.tensor([2.0, 2.0]), P, weight=0.5).solution
        >>> [round(entry, 4) for entry in x.tolist()]
        [2.0, 1.0]
    """
    check_not_negative(damping=damping, keep_pairs=keep_pairs)
    if not 0 <= weight < 1:
        raise ValueError(f"weight, the share of the preconditioner's inverse, must lie in [0, 1), got {weight}.")
    check_vector(operator, rhs, "blended_conjugate_gradient")
    check_preconditioner(operator, preconditioner)
    blend = _Blend(operator, preconditioner, weight, damping)
    state, status = blend.start(rhs.detach().clone())
    rhs_norm, probe = state.residual_norm, None
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=keep_pairs)
    while status is None:
        progress = Progress(state.products, state.residual_norm, rhs_norm, state.decreases)
        if (status := first_answer(stopping, progress)) is not None:
            break
        if state.products > 0:
            state = blend.aim(state)
        if not state.descent > 0:
            # The residual is zero, or rounding has made the preconditioner indefinite.
            status = KrylovStatus.BREAKDOWN if state.residual_norm > 0 else KrylovStatus.CONVERGED
            break
        probe = blend.probe(state)
        state = replace(state, products=state.products + 1)
        pairs.append((state.direction, probe.image))
        status = probe.disturbance
        if status is None:
            state = blend.advance(state, probe)
    disturbed = probe is not None and status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
    curvature, squared, promised = dots(
        (state.solution, state.image), (state.solution, state.solution), (rhs, state.solution)
    )
    return KrylovResult(
        solution=state.solution,
        image=state.image,
        status=status,
        iterations=len(state.decreases) - 1,
        products=state.products,
        residual_norm=state.residual_norm,
        predicted_decrease=promised - curvature / 2,
        damped_decrease=promised - (curvature + damping * squared) / 2,
        curvature=curvature,
        decreases=state.decreases,
        disturbing_direction=state.direction if disturbed else None,
        disturbing_image=probe.image if probe is not None and disturbed else None,
        disturbing_curvature=probe.curvature if probe is not None and disturbed else None,
        pairs=tuple(pairs),
    )


@dataclass(frozen=True, eq=False)
class _State:
    solution: Tensor
    image: Tensor  # A x
    residual: Tensor
    direction: Tensor
    prior_image: Tensor  # P⁻¹p
    descent: float  # rᵀPr
    residual_norm: float
    decreases: tuple[float, ...] = (0.0,)
    products: int = 0


@dataclass(frozen=True, eq=False)
class _Probe:
    image: Tensor  # A p
    curvature: float  # pᵀAp
    blended: float

    @property
    def disturbance(self) -> KrylovStatus | None:
        if not math.isfinite(self.blended):
            return KrylovStatus.NON_FINITE
        return KrylovStatus.DISTURBING_NEGATIVE_CURVATURE if self.blended <= 0 else None


@dataclass(frozen=True, eq=False)
class _Blend:
    operator: LinearOperator
    preconditioner: LinearOperator
    weight: float
    damping: float

    def start(self, rhs: Tensor) -> tuple[_State, KrylovStatus | None]:
        z = self.preconditioner @ rhs
        descent, squared = dots((rhs, z), (rhs, rhs))
        zero = torch.zeros_like(rhs)
        state = _State(zero, zero, rhs, z, rhs, descent, math.sqrt(squared))
        if not math.isfinite(descent + squared):
            return state, KrylovStatus.NON_FINITE
        if squared == 0:
            return state, KrylovStatus.CONVERGED
        if descent <= 0:
            raise IndefinitePreconditionerError(descent)
        return state, None

    def probe(self, state: _State) -> _Probe:
        p = state.direction
        image = self.operator @ p
        curvature, squared, prior = dots((p, image), (p, p), (p, state.prior_image))
        blended = (1 - self.weight) * (curvature + self.damping * squared) + self.weight * prior
        return _Probe(image, curvature, blended)

    def advance(self, state: _State, probe: _Probe) -> _State:
        p, step_length = state.direction, state.descent / probe.blended
        blended_image = (1 - self.weight) * (probe.image + self.damping * p) + self.weight * state.prior_image
        residual = torch.add(state.residual, blended_image, alpha=-step_length)
        return replace(
            state,
            solution=torch.add(state.solution, p, alpha=step_length),
            image=torch.add(state.image, probe.image, alpha=step_length),
            residual=residual,
            residual_norm=math.sqrt(dots((residual, residual))[0]),
            decreases=(*state.decreases, state.decreases[-1] + step_length * state.descent / 2),
        )

    def aim(self, state: _State) -> _State:
        """The next direction; put off until it is needed, since P may cost as much as A."""
        r = state.residual
        z = self.preconditioner @ r
        (descent,) = dots((r, z))
        ratio = descent / state.descent
        return replace(
            state,
            direction=torch.add(z, state.direction, alpha=ratio),
            prior_image=torch.add(r, state.prior_image, alpha=ratio),
            descent=descent,
        )
