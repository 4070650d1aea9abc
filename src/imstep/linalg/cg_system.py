"""One iteration of conjugate gradients as pure functions of a state: probe a direction, move along it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from imstep.linalg.arguments import IndefinitePreconditionerError
from imstep.linalg.dots import dots, unit_of
from imstep.linalg.halved import HalvedOperator, NoiseTest
from imstep.linalg.operator import LinearOperator
from imstep.linalg.result import KrylovStatus


@dataclass(frozen=True, eq=False)
class Probe:
    """A search direction p and what one product with A tells about it."""

    direction: Tensor
    image: Tensor  # A p, without damping
    squared_norm: float
    curvature: float  # pᵀAp, without damping
    damped_curvature: float
    image_norm: float
    halves: tuple[float, float] | None  # damped curvatures of the two half-batches


@dataclass(frozen=True, eq=False)
class CGState:
    """An iterate and all that the recurrences carry to the next one."""

    solution: Tensor
    image: Tensor  # A x, without damping
    residual: Tensor  # b - (A + λI) x
    direction: Tensor
    descent: float  # rᵀz = rᵀp > 0, the rate at which the model gains along p; 0 before a first p
    unit: float  # of z = unit · P r: the first is about 1 long
    norm: float  # ‖x‖
    residual_norm: float
    decreases: tuple[float, ...]
    products: int

    @property
    def iteration(self) -> int:
        return len(self.decreases) - 1


@dataclass(frozen=True, eq=False)
class DampedSystem:
    """(A + λI) x = b with the tests that its directions must pass; the steps of `conjugate_gradient`."""

    operator: LinearOperator
    rhs: Tensor
    damping: float
    preconditioner: LinearOperator | None
    curvature_floor: float
    noise: NoiseTest | None
    radius: float | None
    refresh_every: int | None

    @cached_property
    def rhs_norm(self) -> float:
        """‖b‖."""
        return math.sqrt(dots((self.rhs, self.rhs))[0])

    @property
    def rounding(self) -> float:
        """The spacing of numbers near 1 in the dtype of the vectors."""
        return torch.finfo(self.rhs.dtype).eps

    @property
    def largest(self) -> float:
        """The largest number in the dtype of the vectors; PyTorch raises where a factor is larger."""
        return torch.finfo(self.rhs.dtype).max

    def start(self, x0: Tensor | None) -> tuple[CGState, KrylovStatus | None]:
        """The state at x0, or at zero, and a status if the solve is over already."""
        zero = self._at_zero()
        if not math.isfinite(zero.residual_norm):
            return zero, KrylovStatus.NON_FINITE
        if zero.residual_norm == 0:
            return zero, KrylovStatus.CONVERGED
        state = zero if x0 is None else self._at(x0.detach().clone())
        if not math.isfinite(state.residual_norm):
            return replace(zero, products=state.products), KrylovStatus.NON_FINITE
        if self.radius is not None and state.norm >= self.radius:
            raise ValueError(
                f"x0 has norm {state.norm:.3g}; it must lie inside the radius {self.radius:.3g}."
            )
        return state, None

    def aim(self, state: CGState) -> tuple[CGState, KrylovStatus | None]:
        """The state with its next search direction, conjugate to the last one if there was one, or why there is none.

        Put off until it is needed, since the preconditioner may cost as much as A.
        """
        residual = state.residual
        preconditioned = residual if self.preconditioner is None else self.preconditioner.matvec(residual)
        # A power of two makes no other iterates. Without it A b may leave the range of the dtype.
        unit = state.unit if state.descent > 0 else unit_of(preconditioned)
        preconditioned = unit * preconditioned
        (descent,) = dots((residual, preconditioned))
        if not math.isfinite(descent):
            return state, KrylovStatus.NON_FINITE
        if descent <= 0:
            if state.iteration == 0:
                raise IndefinitePreconditionerError(descent)
            return state, KrylovStatus.BREAKDOWN  # rounding has made the preconditioner indefinite
        direction = preconditioned
        if state.descent > 0:
            ratio = descent / state.descent
            if not ratio <= self.largest:
                return state, KrylovStatus.NON_FINITE
            direction = torch.add(preconditioned, state.direction, alpha=ratio)
        return replace(state, direction=direction, descent=descent, unit=unit), None

    def probe(self, direction: Tensor) -> Probe:
        """One product with A along a direction."""
        if self.noise is None:
            image, halves = self.operator.matvec(direction), None
        else:
            image, first, second = cast(HalvedOperator, self.operator).measure(direction)
            halves = first, second
        squared_norm, curvature, image_squared = dots(
            (direction, direction), (direction, image), (image, image)
        )
        shift = self.damping * squared_norm
        return Probe(
            direction=direction,
            image=image,
            squared_norm=squared_norm,
            curvature=curvature,
            damped_curvature=curvature + shift,
            image_norm=math.sqrt(image_squared),
            halves=None if halves is None else (halves[0] + shift, halves[1] + shift),
        )

    def disturbance(self, probe: Probe) -> KrylovStatus | None:
        """Why x must not move along the direction, or None if it may."""
        if not (math.isfinite(probe.curvature) and math.isfinite(probe.image_norm)):
            return KrylovStatus.NON_FINITE
        # For definite A of condition κ the cosine of p and A p is at least 2√κ/(κ + 1) (Kantorovich). A sum
        # pᵀAp below its own rounding error therefore means that A is not definite, or κ > 1/eps².
        rounding_error = self.rounding * math.sqrt(probe.squared_norm) * probe.image_norm
        if probe.damped_curvature <= max(self.curvature_floor * probe.squared_norm, rounding_error):
            return KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
        if self.noise is not None and probe.halves is not None and self.noise.disturbs(*probe.halves):
            return KrylovStatus.DISTURBING_NOISE
        return None

    def advance(self, state: CGState, probe: Probe) -> tuple[CGState, KrylovStatus | None]:
        """The next state, and a status if the move ends the solve."""
        step_length = state.descent / probe.damped_curvature
        if not step_length * max(self.damping, 1.0) <= self.largest:
            return state, KrylovStatus.NON_FINITE
        moved = self._moved(state, probe, step_length)
        if not (math.isfinite(moved.norm) and math.isfinite(moved.residual_norm)):
            return state, KrylovStatus.NON_FINITE
        if self.radius is not None and moved.norm >= self.radius:
            return self.move_to_boundary(state, probe), KrylovStatus.BOUNDARY
        if self.refresh_every is not None and moved.iteration % self.refresh_every == 0:
            moved = self._refreshed(moved)
            if not math.isfinite(moved.residual_norm):
                return replace(state, products=moved.products), KrylovStatus.NON_FINITE
        return moved, None

    def move_to_boundary(self, state: CGState, probe: Probe) -> CGState:
        """The state at ‖x + τp‖ = radius, τ > 0; along rᵀp > 0 the model gains all the way if pᵀAp <= 0."""
        radius = cast(float, self.radius)
        (inner,) = dots((state.solution, probe.direction))
        slack = (radius - state.norm) * (radius + state.norm)
        root = math.sqrt(inner * inner + probe.squared_norm * slack)
        # Two forms of the positive root, each without cancellation for one sign of xᵀp.
        step_length = slack / (inner + root) if inner > 0 else (root - inner) / probe.squared_norm
        return self._moved(state, probe, step_length)

    def _at_zero(self) -> CGState:
        # Copies, so that nothing in a result shares memory with an argument or another part of the result.
        residual = self.rhs.clone()
        return CGState(
            solution=torch.zeros_like(residual),
            image=torch.zeros_like(residual),
            residual=residual,
            direction=residual,
            descent=0.0,
            unit=1.0,
            norm=0.0,
            residual_norm=self.rhs_norm,
            decreases=(0.0,),
            products=0,
        )

    def _at(self, x0: Tensor) -> CGState:
        image = self.operator.matvec(x0)
        residual = self.rhs - image - self.damping * x0
        rhs_inner, residual_inner, squared_norm, residual_squared = dots(
            (x0, self.rhs), (x0, residual), (x0, x0), (residual, residual)
        )
        return CGState(
            solution=x0,
            image=image,
            residual=residual,
            direction=residual,
            descent=0.0,
            unit=1.0,
            norm=math.sqrt(squared_norm),
            residual_norm=math.sqrt(residual_squared),
            decreases=((rhs_inner + residual_inner) / 2,),  # bᵀx - xᵀ(A + λI)x/2, the product being b - r
            products=1,
        )

    def _moved(self, state: CGState, probe: Probe, step_length: float) -> CGState:
        solution = torch.add(state.solution, probe.direction, alpha=step_length)
        residual = torch.add(state.residual, probe.image, alpha=-step_length)
        if self.damping > 0:
            residual.add_(probe.direction, alpha=-step_length * self.damping)
        squared_norm, residual_squared = dots((solution, solution), (residual, residual))
        gain = step_length * (state.descent - step_length * probe.damped_curvature / 2)
        return replace(
            state,
            solution=solution,
            image=torch.add(state.image, probe.image, alpha=step_length),
            residual=residual,
            norm=math.sqrt(squared_norm),
            residual_norm=math.sqrt(residual_squared),
            decreases=(*state.decreases, state.decreases[-1] + gain),
        )

    def _refreshed(self, state: CGState) -> CGState:
        image = self.operator.matvec(state.solution)
        residual = self.rhs - image - self.damping * state.solution
        drift = residual - state.residual
        squared_norm, drift_squared = dots((residual, residual), (drift, drift))
        # A residual that is largely drift is orthogonal to nothing, and r'ᵀz'/rᵀz could blow up the last
        # direction by orders of magnitude: start afresh from it, as iterative refinement does.
        restart = drift_squared > 0.01 * squared_norm
        return replace(
            state,
            image=image,
            residual=residual,
            residual_norm=math.sqrt(squared_norm),
            descent=0.0 if restart else state.descent,
            products=state.products + 1,
        )
