"""The Taylor monitor: step lengths from the measured error of the quadratic model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from imstep.globalization.model import LineModel
from imstep.globalization.search import (
    Reason,
    SearchState,
    StepSearch,
    Verdict,
    decrease_ratio,
    require_descent,
)

_NOTABLE = 0.1  # deviations of rho from 1 below this are taken as agreement


@dataclass(frozen=True)
class TaylorMonitor(StepSearch):
    """Go as far as the model's predicted relative error stays below theta.

    The error E(t) = f(w + t d) - m(t) is third order, E ≈ C t³ with C = M ‖d‖³ / 6. A running estimate of M,

        C t³ = θ q(t)   gives   t* = 2 θ |s| / (θk/2 + √(θ²k²/4 + 4 C θ |s|)),

    bounds the proposal min(t*, |s|/k if k > 0, Δ/‖d‖). A trial is accepted if rho >= acceptance; otherwise t*
    is taken again with the M that the trial has shown, kept within t/10 and t/2. The direction stays fixed
    while t shrinks, as in a line search; M and Δ carry over to the next step, as in a trust region:

        accepted:  M <- max(M observed, M/2);   Δ <- t‖d‖/2 if rho < 1/4,  2Δ if rho > 3/4 at the bound
        given up:  Δ <- half the length of the first trial

    It is cautious on evidence only: without any it takes the model's minimiser.

    Where an accepted trial shows that caution was not needed, because the loss fell more than the model said or as much
    though t was short of the minimiser, it goes on forward while the loss falls.

    Args:
        theta: θ in (0, 1), the relative error |E|/q that a proposal may be predicted to have.
        forward: factor by which an accepted t is lengthened where that looks worth a trial, >= 1; 1 for never.
        acceptance: the least rho of an accepted trial, in [0, 1).
        third_derivative: M before the first step, >= 0.
        radius: Δ before the first step, > 0.

    Raises:
        ValueError: an argument is out of range.

    Cost: a loss per trial.

    Source: the idea (monitor the Taylor error, combine line search and trust region) is of Shen et al.,
    arXiv 2009.07098; the rules are our choice, with the radius update of Nocedal & Wright, Numerical
    Optimization (2nd ed.), Algorithm 4.1.

    Example:
        >>> monitor = TaylorMonitor()
        >>> model = LineModel(loss=1.0, slope=-1.0, curvature=0.5, norm=1.0)
        >>> monitor.propose(monitor.initial(), model)   # nothing seen yet: the minimiser
        2.0
        >>> round(monitor.propose(SearchState(third_derivative=6.0), model), 3)   # C = 1: t³ = q(t)/4
        0.47
    """

    theta: float = 0.25
    forward: float = 2.0
    acceptance: float = 1e-4
    third_derivative: float = 0.0
    radius: float = math.inf

    def __post_init__(self) -> None:
        if not (0 < self.theta < 1 and 0 <= self.acceptance < 1):
            raise ValueError(
                f"theta must lie in (0, 1) and acceptance in [0, 1), got {self.theta} and {self.acceptance}."
            )
        if not 1 <= self.forward < math.inf:
            raise ValueError(f"forward, a factor on the step length, is at least 1, got {self.forward}.")
        if not (0 <= self.third_derivative < math.inf and self.radius > 0):
            raise ValueError(
                "third_derivative must be finite and not negative, radius positive, got "
                f"{self.third_derivative} and {self.radius}."
            )

    def extend(self, model: LineModel, verdict: Verdict) -> float | None:
        better_than_foreseen = not verdict.rho <= 1 + _NOTABLE  # nan: beyond what the model foresees
        held_back = verdict.step_length < 0.7 * model.minimizer and verdict.rho > 1 - _NOTABLE
        if self.forward == 1 or not (better_than_foreseen or held_back):
            return None
        return self.forward * verdict.step_length

    def initial(self) -> SearchState:
        return SearchState(self.third_derivative, self.radius)

    def propose(self, state: SearchState, model: LineModel) -> float:
        require_descent(model)
        bound = min(
            self._within_error(state.third_derivative, model), model.minimizer, state.radius / model.norm
        )
        if math.isfinite(bound):
            return bound
        # A model without minimum, and no evidence yet: as long as if the curvature had the other sign.
        return -model.slope / -model.curvature if model.curvature < 0 else 1.0

    def weigh(self, state: SearchState, model: LineModel, step_length: float, taylor_error: float) -> Verdict:
        rho = decrease_ratio(model, step_length, taylor_error)
        observed = self._observed(model, step_length, taylor_error)
        if rho >= self.acceptance:
            new_state = SearchState(
                max(observed, state.third_derivative / 2), self._radius_after(state, model, step_length, rho)
            )
            return Verdict(True, step_length, rho, taylor_error, new_state, Reason.ACCEPTED)
        # A rejected trial shortens this step only: an error that is no cubic (a jump, a noisy loss) would
        # leave an absurd M behind, and M forgets by halves.
        if not math.isfinite(taylor_error):
            return Verdict(False, step_length / 10, rho, taylor_error, state, Reason.NON_FINITE)
        within = self._within_error(max(state.third_derivative, observed), model)
        shorter = min(max(within, step_length / 10), step_length / 2)
        return Verdict(False, shorter, rho, taylor_error, state, Reason.INSUFFICIENT_DECREASE)

    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        return SearchState(state.third_derivative, min(state.radius, step_length * model.norm) / 2)

    def _within_error(self, third_derivative: float, model: LineModel) -> float:
        """t*, the root of C t³ = θ q(t); infinite where the error never reaches θ q."""
        # In the length t‖d‖, so that no cube of the norm can overflow.
        cubic = third_derivative / 6
        linear = self.theta * -model.slope / model.norm
        half = self.theta * model.curvature / model.norm / model.norm / 2
        root = math.sqrt(half * half + 4 * cubic * linear)
        # Each form adds numbers of one sign.
        if half > 0:
            return 2 * linear / (half + root) / model.norm
        return (root - half) / (2 * cubic) / model.norm if cubic > 0 else math.inf

    def _observed(self, model: LineModel, step_length: float, taylor_error: float) -> float:
        """6 |E| / (t ‖d‖)³, of the part of E above the rounding of two losses."""
        resolved = max(abs(taylor_error) - model.rounding, 0.0)
        length = step_length * model.norm
        return 6 * resolved / length / length / length

    def _radius_after(self, state: SearchState, model: LineModel, step_length: float, rho: float) -> float:
        length = step_length * model.norm
        if rho < 0.25:
            return length / 2
        at_bound = length >= 0.999 * state.radius  # t = Δ/‖d‖ gives t ‖d‖ = Δ up to rounding
        return 2 * state.radius if rho > 0.75 and at_bound else state.radius
