"""The Taylor monitor: step lengths from the measured error of the quadratic model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from imstep.globalization.estimate import ErrorEstimate, RunningEstimate, third_derivative_for, within_cubic
from imstep.globalization.model import LineModel, Trial
from imstep.globalization.search import (
    NOTABLE,
    Reason,
    SearchState,
    StepSearch,
    Verdict,
    decrease_ratio,
    require_descent,
)


@dataclass(frozen=True)
class TaylorMonitor(StepSearch):
    """Go as far as the model's predicted relative error stays below theta.

    The error E(t) = f(w + t d) - m(t) is third order, E ≈ C t³ with C = M ‖d‖³ / 6. A running estimate of M,

        C t³ = θ q(t)   gives   t* = 2 θ |s| / (θk/2 + √(θ²k²/4 + 4 C θ |s|)),

    bounds the proposal min(t*, |s|/k if k > 0, Δ/‖d‖). A trial is accepted if rho >= acceptance; otherwise t*
    is taken again with the M that the trial has shown, kept within t/10 and t/2. The direction stays fixed
    while t shrinks, as in a line search; M and Δ carry over to the next step, as in a trust region:

        accepted:  Δ <- t‖d‖/2 if rho < 1/4;   at the bound and beyond  2t‖d‖ if rho > 3/4,  else t‖d‖
        given up:  Δ <- half the length of the first trial

    It is cautious on evidence only: without any it takes the model's minimiser.

    Where an accepted trial shows that caution was not needed, because the loss fell more than the model said or as much
    though t was short of the minimiser, it goes on forward while the loss falls.

    Args:
        theta: θ in (0, 1), the relative error |E|/q that a proposal may be predicted to have.
        forward: factor by which an accepted t is lengthened where that looks worth a trial, >= 1; 1 for never.
        acceptance: the least rho of an accepted trial, in [0, 1).
        radius: Δ before the first step, > 0.
        error: where the prediction of the error comes from.

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
    radius: float = math.inf
    error: ErrorEstimate = field(default_factory=RunningEstimate)

    @property
    def needs_derivatives(self) -> bool:
        return self.error.needs_derivatives

    def __post_init__(self) -> None:
        if not (0 < self.theta < 1 and 0 <= self.acceptance < 1):
            raise ValueError(
                f"theta must lie in (0, 1) and acceptance in [0, 1), got {self.theta} and {self.acceptance}."
            )
        if not 1 <= self.forward < math.inf:
            raise ValueError(f"forward, a factor on the step length, is at least 1, got {self.forward}.")
        if not self.radius > 0:
            raise ValueError(f"radius must be positive, got {self.radius}.")

    def full(self, model: LineModel) -> float:
        return model.minimizer

    def extend(self, model: LineModel, verdict: Verdict) -> float | None:
        better_than_foreseen = not verdict.rho <= 1 + NOTABLE  # nan: beyond what the model foresees
        held_back = verdict.step_length < 0.7 * model.minimizer and verdict.rho > 1 - NOTABLE
        if self.forward == 1 or not (better_than_foreseen or held_back):
            return None
        return self.forward * verdict.step_length

    def initial(self) -> SearchState:
        return SearchState(self.error.initial, self.radius)

    def propose(self, state: SearchState, model: LineModel) -> float:
        require_descent(model)
        within = self.error.within(self.theta, state.third_derivative, model)
        bound = min(within, model.minimizer, state.radius / model.norm)
        if math.isfinite(bound):
            return bound
        # A model without minimum, and no evidence yet: as long as if the curvature had the other sign.
        return -model.slope / -model.curvature if model.curvature < 0 else 1.0

    def judge(self, state: SearchState, model: LineModel, trial: Trial) -> Verdict:
        t, error = trial.step_length, model.taylor_error(trial)
        rho = decrease_ratio(model, t, error)
        if rho >= self.acceptance:
            third_derivative = self.error.remembered(state.third_derivative, model, t, error)
            radius = self._radius_after(state, model, t, rho)
            return Verdict(True, t, rho, error, SearchState(third_derivative, radius), Reason.ACCEPTED)
        # A rejected trial shortens this step only: an error that is no cubic (a jump, a noisy loss) would
        # leave an absurd M behind, and M forgets by halves.
        if not math.isfinite(error):
            return Verdict(False, t / 10, rho, error, state, Reason.NON_FINITE)
        observed = third_derivative_for(model, t, error)
        within = within_cubic(self.theta, max(state.third_derivative, observed), model)
        shorter = min(max(within, t / 10), t / 2)
        return Verdict(False, shorter, rho, error, state, Reason.INSUFFICIENT_DECREASE)

    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        return SearchState(state.third_derivative, min(state.radius, step_length * model.norm) / 2)

    def _radius_after(self, state: SearchState, model: LineModel, step_length: float, rho: float) -> float:
        length = step_length * model.norm
        if rho < 0.25:
            return length / 2
        if length < 0.999 * state.radius:  # t = Δ/‖d‖ gives t ‖d‖ = Δ up to rounding
            return state.radius
        return 2 * length if rho > 0.75 else length
