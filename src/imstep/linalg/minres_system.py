"""One iteration of minimal residuals as pure functions of a state: probe the residual, move."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from imstep.linalg.arguments import IndefinitePreconditionerError
from imstep.linalg.dots import dots
from imstep.linalg.operator import LinearOperator
from imstep.linalg.result import KrylovStatus

PATIENCE = 20
"""Iterations that a residual must have stayed as long to count as a null vector."""


@dataclass(frozen=True, eq=False)
class LanczosVector:
    """A Lanczos vector in two forms, u and v = P u, scaled to uᵀv = 1."""

    u: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class MinresState:
    """An iterate and all that the recurrences carry to iteration k, the first being k = 1."""

    solution: Tensor
    residual: Tensor  # r = b - (A + λI) x
    direction: Tensor  # p = P r, whose curvature the next product tells
    norm: float  # ‖x‖
    residual_norm: float
    phi: float  # ‖r‖ in the metric of P
    decreases: tuple[float, ...]
    products: int
    vector: LanczosVector  # number k
    last_u: Tensor  # number k - 1
    beta: float  # β_k, which couples the two; 0 for k = 1
    steps: tuple[Tensor, Tensor]  # d_{k-1}, d_{k-2}: x moves along d
    cosine: float  # of the last rotation
    sine: float
    delta: float  # δ_k and ε_k: what rotations left above the diagonal in column k of T
    epsilon: float
    matrix_norm: float  # the largest column of T so far, at most ‖A + λI‖ in the metric of P

    @property
    def iteration(self) -> int:
        return len(self.decreases) - 1


@dataclass(frozen=True, eq=False)
class Probe:
    """What one product tells about the residual's direction p and about the next Lanczos vector."""

    direction: Tensor  # p
    squared_norm: float  # pᵀp
    curvature: float  # pᵀAp, without damping
    damped_curvature: float
    image_norm: float  # ‖(A + λI) p‖ in the metric of P
    vector: LanczosVector  # number k + 1
    alpha: float  # α_k
    beta: float  # β_{k+1}; nan where P has proved indefinite
    gamma: float  # γ_k, the diagonal of column k before its own rotation
    matrix_norm: float


@dataclass(frozen=True, eq=False)
class NullWatch:
    """Watches for a residual that is a null vector: A + λI shrinks it to the root of rounding, and it stays as long.

    A residual along small eigenvalues is shrunk as well, but falls when the iteration gets to them.
    """

    level: float
    closest: MinresState | None = None  # the iterate whose residual was shrunk most
    shrinkage: float = math.inf
    phi: float = math.inf  # ‖r‖_P when the wait began
    since: int = 0

    def after(self, state: MinresState, probe: Probe) -> NullWatch:
        """The watch when the image of a state's residual is known."""
        shrinkage = probe.image_norm / (probe.matrix_norm * state.phi) if probe.matrix_norm > 0 else 0.0
        watch = self
        if watch.closest is None or state.phi < 0.99 * watch.phi:
            watch = replace(watch, phi=state.phi, since=state.iteration)
        if watch.closest is not None and state.phi < 0.9 * watch.closest.phi:
            watch = replace(watch, closest=None, shrinkage=math.inf)
        # Once rounding has given a null vector some curvature, x grows out of bounds along it and ‖r‖ falls a little.
        sound = watch.closest is None or state.norm <= 10 * watch.closest.norm
        if sound and shrinkage <= min(watch.level, watch.shrinkage):
            watch = replace(watch, closest=state, shrinkage=shrinkage)
        return watch

    def certain(self, state: MinresState, rounding: float) -> bool:
        """Whether the system has no solution."""
        waited = self.closest is not None and state.iteration - self.since >= PATIENCE
        return waited or self.shrinkage <= 10 * rounding


@dataclass(frozen=True, eq=False)
class ShiftedSystem:
    """(A + λI) x = b with the test that its residuals must pass; the steps of `minres`."""

    operator: LinearOperator
    rhs: Tensor
    damping: float
    preconditioner: LinearOperator | None
    curvature_floor: float | None

    @cached_property
    def rhs_norm(self) -> float:
        """‖b‖."""
        return math.sqrt(dots((self.rhs, self.rhs))[0])

    @property
    def rounding(self) -> float:
        """The spacing of numbers near 1 in the dtype of the vectors."""
        return torch.finfo(self.rhs.dtype).eps

    @property
    def null_level(self) -> float:
        """Below this cosine, or part of the matrix's norm, nothing is told from zero: Ritz values err by the square."""
        return 3 * math.sqrt(self.rounding)

    def start(self, x0: Tensor | None) -> tuple[MinresState, KrylovStatus | None]:
        """The state at x0, or at zero, and a status if the solve is over already."""
        zero = replace(self._at(torch.zeros_like(self.rhs), self.rhs.clone(), products=0), decreases=(0.0,))
        if not math.isfinite(zero.residual_norm):
            return zero, KrylovStatus.NON_FINITE
        if zero.residual_norm == 0:
            return zero, KrylovStatus.CONVERGED
        state = zero
        if x0 is not None:
            x = x0.detach().clone()
            state = self._at(x, self.rhs - self.operator.matvec(x) - self.damping * x, products=1)
        if not math.isfinite(state.residual_norm):
            return replace(zero, products=state.products), KrylovStatus.NON_FINITE
        if state.residual_norm == 0:
            return state, KrylovStatus.CONVERGED
        direction = self._preconditioned(state.residual)
        (squared,) = dots((state.residual, direction))
        if squared <= 0:
            raise IndefinitePreconditionerError(squared)
        phi = math.sqrt(squared)
        if not math.isfinite(phi):
            return state, KrylovStatus.NON_FINITE
        vector = LanczosVector(state.residual / phi, direction / phi)
        return replace(state, direction=direction, phi=phi, vector=vector), None

    def probe(self, state: MinresState) -> Probe:
        """One product with A along the Lanczos vector."""
        u, v = state.vector.u, state.vector.v
        image = torch.sub(self.operator.matvec(v), state.last_u, alpha=state.beta)
        if self.damping > 0:
            image.add_(v, alpha=self.damping)
        (alpha,) = dots((v, image))
        image.sub_(u, alpha=alpha)
        preconditioned = self._preconditioned(image)
        squared, squared_norm = dots((image, preconditioned), (state.direction, state.direction))
        beta = math.sqrt(squared) if squared >= 0 else math.nan
        gamma = state.sine * state.delta - state.cosine * alpha
        damped_curvature = -state.cosine * gamma * state.phi**2
        return Probe(
            direction=state.direction,
            squared_norm=squared_norm,
            curvature=damped_curvature - self.damping * squared_norm,
            damped_curvature=damped_curvature,
            image_norm=state.phi * math.hypot(gamma, state.cosine * beta),
            vector=LanczosVector(image / beta, preconditioned / beta) if beta > 0 else state.vector,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            matrix_norm=max(state.matrix_norm, math.hypot(state.beta, alpha, beta)),
        )

    def disturbance(self, state: MinresState, probe: Probe) -> KrylovStatus | None:
        """Why x must not move, or None if it may."""
        if not math.isfinite(probe.alpha) or math.isinf(probe.beta):
            return KrylovStatus.NON_FINITE
        if math.isnan(probe.beta):
            return KrylovStatus.BREAKDOWN  # rounding has made the preconditioner indefinite
        if self.curvature_floor is None:
            return None
        # A definite matrix of condition κ turns no vector further than to a cosine of 2√κ/(κ + 1) (Kantorovich): below
        # this level it is singular to working precision. Next to a null vector the cosine falls with the root too;
        # at one, where it is noise, the curvature is within the rounding error of the recurrences.
        least = max(
            self.curvature_floor * probe.squared_norm,
            self.null_level * state.phi * probe.image_norm,
            10 * self.rounding * probe.matrix_norm * state.phi**2,
        )
        disturbs = probe.damped_curvature <= least
        return KrylovStatus.DISTURBING_NEGATIVE_CURVATURE if disturbs else None

    def advance(self, state: MinresState, probe: Probe) -> tuple[MinresState, KrylovStatus | None]:
        """The next state, and a status if the move ends the solve."""
        last, before = state.steps
        gamma = math.hypot(probe.gamma, probe.beta)
        cosine, sine = probe.gamma / gamma, probe.beta / gamma
        delta = state.cosine * state.delta + state.sine * probe.alpha
        step = torch.sub(state.vector.v, last, alpha=delta).sub_(before, alpha=state.epsilon).div_(gamma)
        solution = torch.add(state.solution, step, alpha=cosine * state.phi)
        phi = sine * state.phi
        rotated = lambda old, new: torch.mul(old, sine**2).sub_(new, alpha=phi * cosine)
        residual = rotated(state.residual, probe.vector.u)
        moved = replace(
            self._at(solution, residual, state.products),
            direction=residual if self.preconditioner is None else rotated(state.direction, probe.vector.v),
            phi=phi,
            vector=probe.vector,
            last_u=state.vector.u,
            beta=probe.beta,
            steps=(step, last),
            cosine=cosine,
            sine=sine,
            delta=-state.cosine * probe.beta,
            epsilon=state.sine * probe.beta,
            matrix_norm=probe.matrix_norm,
        )
        if not (math.isfinite(moved.residual_norm) and math.isfinite(moved.decreases[-1])):
            return state, KrylovStatus.NON_FINITE
        if self.curvature_floor is None and self._is_rounding(step, cosine, probe):
            return state, KrylovStatus.LEAST_SQUARES
        return replace(moved, decreases=(*state.decreases, *moved.decreases)), None

    def _is_rounding(self, step: Tensor, cosine: float, probe: Probe) -> bool:
        """Whether the product with the move of x is rounding only: it goes along a null vector."""
        (squared,) = dots((step, step))
        return self.rounding * probe.matrix_norm * abs(cosine) * math.sqrt(squared) > 0.1

    def image_of(self, state: MinresState, probe: Probe, unit: float) -> Tensor:
        """A p, without damping, for the direction of the residual times ``unit``."""
        image = torch.mul(state.vector.u, probe.gamma).sub_(probe.vector.u, alpha=state.cosine * probe.beta)
        return image.mul_(unit * state.phi).sub_(probe.direction, alpha=unit * self.damping)

    def shortened(self, state: MinresState) -> MinresState:
        """The state with the part of x along the null vector p = P r taken out, unless ‖r‖_P grows: one product."""
        overlap, squared = dots((state.solution, state.residual), (state.direction, state.residual))
        solution = torch.sub(state.solution, state.direction, alpha=overlap / squared)
        residual = self.rhs - self.operator.matvec(solution) - self.damping * solution
        (squared_norm,) = dots((residual, self._preconditioned(residual)))
        if not squared_norm <= (1 + self.null_level) * state.phi**2:
            return replace(state, products=state.products + 1)
        shorter = self._at(solution, residual, state.products + 1)
        return replace(shorter, decreases=(*state.decreases[:-1], *shorter.decreases))

    def _preconditioned(self, vector: Tensor) -> Tensor:
        return vector if self.preconditioner is None else self.preconditioner.matvec(vector)

    def _at(self, solution: Tensor, residual: Tensor, products: int) -> MinresState:
        """The state before the first iteration at a point, but for its Lanczos vector."""
        rhs_inner, residual_inner, squared_norm, squared_residual = dots(
            (solution, self.rhs), (solution, residual), (solution, solution), (residual, residual)
        )
        zero = torch.zeros_like(residual)
        return MinresState(
            solution=solution,
            residual=residual,
            direction=residual,
            norm=math.sqrt(squared_norm),
            residual_norm=math.sqrt(squared_residual),
            phi=0.0,
            decreases=((rhs_inner + residual_inner) / 2,),  # bᵀx - xᵀ(A + λI)x/2, the product being b - r
            products=products,
            vector=LanczosVector(zero, zero),
            last_u=zero,
            beta=0.0,
            steps=(zero, zero),
            cosine=-1.0,
            sine=0.0,
            delta=0.0,
            epsilon=0.0,
            matrix_norm=0.0,
        )
