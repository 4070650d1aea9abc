"""The classical trust region, with backtracking inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from imstep.globalization.model import LineModel, Trial
from imstep.globalization.search import (
    Reason,
    SearchState,
    StepSearch,
    Verdict,
    decrease_ratio,
    require_descent,
)


@dataclass(frozen=True)
class TrustRegion(StepSearch):
    """Step t = min(1, Δ/‖d‖), and let Δ follow the ratio rho of actual to predicted decrease.

        rho < 1/4:   Δ <- t‖d‖/4;      rho > 3/4 and t‖d‖ = Δ:   Δ <- 2Δ

    It belongs with a solver that minimises the model within Δ, so that t = 1; with any other it cuts steps that are
    too long. A refused trial is not solved for again but shortened along d by quadratic interpolation,

        t <- t clip(t s / (2 (t s - f(w + t d) + f)), 1/10, 1/2),

    and Δ becomes the length of what is accepted. While Δ is infinite, any step sets it.

    Args:
        radius: Δ before the first step, > 0; infinite to let the first step set it.
        largest: bound on Δ, > 0.
        acceptance: the least rho of an accepted trial, in [0, 1/4).

    Raises:
        ValueError: an argument is out of range.

    Cost: a loss per trial.

    Source: Nocedal & Wright, Numerical Optimization (2nd ed.), Algorithm 4.1; backtracking as Nocedal & Yuan, Combining
    trust region and line search techniques (1998); how Δ starts is our choice.

    Example:
        >>> model = LineModel(loss=1.0, slope=-1.0, curvature=0.5, norm=2.0)
        >>> search = TrustRegion(radius=1.0)
        >>> search.propose(search.initial(), model)
        0.5
    """

    radius: float = math.inf
    largest: float = math.inf
    acceptance: float = 1e-4

    def __post_init__(self) -> None:
        if not (self.radius > 0 and self.largest > 0):
            raise ValueError(f"radius and largest must be positive, got {self.radius} and {self.largest}.")
        if not 0 <= self.acceptance < 0.25:
            raise ValueError(f"acceptance must lie in [0, 1/4), got {self.acceptance}.")

    def initial(self) -> SearchState:
        return SearchState(radius=min(self.radius, self.largest))

    def propose(self, state: SearchState, model: LineModel) -> float:
        require_descent(model)
        return min(1.0, state.radius / model.norm)

    def judge(self, state: SearchState, model: LineModel, trial: Trial) -> Verdict:
        t, error = trial.step_length, model.taylor_error(trial)
        rho = decrease_ratio(model, t, error)
        if not math.isfinite(error):
            return Verdict(False, t / 10, rho, error, state, Reason.NON_FINITE)
        if rho >= self.acceptance:
            radius = min(self._radius_after(state, model, t, rho), self.largest)
            return Verdict(True, t, rho, error, replace(state, radius=radius), Reason.ACCEPTED)
        bend = 2 * (model.change(trial) - t * model.slope)
        share = -t * model.slope / bend if bend > 0 else 0.5
        return Verdict(False, t * min(max(share, 0.1), 0.5), rho, error, state, Reason.INSUFFICIENT_DECREASE)

    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        return replace(state, radius=min(state.radius, step_length * model.norm) / 4)

    def _radius_after(self, state: SearchState, model: LineModel, step_length: float, rho: float) -> float:
        length = step_length * model.norm
        if step_length < 0.999 * self.propose(state, model):  # a trial before it was refused
            return length
        if rho < 0.25:
            return length / 4
        free = math.isinf(state.radius)
        at_bound = free or length >= 0.999 * state.radius  # t = Δ/‖d‖ gives t‖d‖ = Δ up to rounding
        if rho > 0.75 and at_bound:
            return 2 * length
        return length if free else state.radius
