"""Baselines for the step length: backtracking, and none at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
class Armijo(StepSearch):
    """Backtrack from t = 1 until f(w + t d) <= f + c1 t s.

    With ``forward`` the first trial is the model's minimiser where that lies beyond 1, as it does for solutions that
    damping has shortened, and a trial that lowers the loss by notably more than the model said, or as it said along a
    direction in which it has no minimum, is lengthened while the loss falls.

    Args:
        c1: fraction of the linear decrease to ask for, in (0, 1).
        shrink: factor between trials, in (0, 1).
        forward: factor by which t is lengthened, >= 1; 1 for never beyond t = 1.

    Raises:
        ValueError: an argument is out of range.

    Cost: a loss per trial.

    Source: Nocedal & Wright, Numerical Optimization (2nd ed.), Algorithm 3.1; going forward is our choice.

    Example:
        >>> model = LineModel(loss=1.0, slope=-1.0, curvature=0.0, norm=1.0)
        >>> Armijo().judge(SearchState(), model, Trial(1.0, loss=0.5)).accepted
        True
    """

    c1: float = 1e-4
    shrink: float = 0.5
    forward: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.c1 < 1 and 0 < self.shrink < 1):
            raise ValueError(f"c1 and shrink must lie in (0, 1), got {self.c1} and {self.shrink}.")
        if not 1 <= self.forward < math.inf:
            raise ValueError(f"forward, a factor on the step length, is at least 1, got {self.forward}.")

    def initial(self) -> SearchState:
        return SearchState()

    def full(self, model: LineModel) -> float:
        minimizer = model.minimizer
        return minimizer if self.forward > 1 and 1 < minimizer < math.inf else 1.0

    def propose(self, state: SearchState, model: LineModel) -> float:
        require_descent(model)
        return self.full(model)

    def judge(self, state: SearchState, model: LineModel, trial: Trial) -> Verdict:
        t, error = trial.step_length, model.taylor_error(trial)
        rho = decrease_ratio(model, t, error)
        if not math.isfinite(error):
            return Verdict(False, self.shrink * t, rho, error, state, Reason.NON_FINITE)
        if model.change(trial) <= self.c1 * t * model.slope:
            return Verdict(True, t, rho, error, state, Reason.ACCEPTED)
        return Verdict(False, self.shrink * t, rho, error, state, Reason.INSUFFICIENT_DECREASE)

    def extend(self, model: LineModel, verdict: Verdict) -> float | None:
        better_than_foreseen = not verdict.rho <= 1 + NOTABLE  # nan: beyond what the model foresees
        endless = model.curvature <= 0 and verdict.rho > 1 - NOTABLE
        return self.forward * verdict.step_length if self.forward > 1 and (better_than_foreseen or endless) else None

    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        return state


@dataclass(frozen=True)
class FixedStep(StepSearch):
    """Take the same step length whatever happens, unless the trial is not finite.

    Args:
        step_length: t > 0; 1 is the undamped Newton step.

    Raises:
        ValueError: the step length is not positive.

    Source: Nocedal & Wright, Numerical Optimization (2nd ed.), section 3.3, the pure Newton method.

    Example:
        >>> model = LineModel(loss=1.0, slope=-1.0, curvature=0.0, norm=1.0)
        >>> FixedStep(0.1).propose(SearchState(), model)
        0.1
    """

    step_length: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.step_length < math.inf:
            raise ValueError(f"step_length must be positive and finite, got {self.step_length}.")

    def initial(self) -> SearchState:
        return SearchState()

    def propose(self, state: SearchState, model: LineModel) -> float:
        return self.step_length

    def full(self, model: LineModel) -> float:
        return self.step_length

    def judge(self, state: SearchState, model: LineModel, trial: Trial) -> Verdict:
        t, error = trial.step_length, model.taylor_error(trial)
        rho = decrease_ratio(model, t, error)
        if not math.isfinite(error):
            return Verdict(False, t / 2, rho, error, state, Reason.NON_FINITE)
        return Verdict(True, t, rho, error, state, Reason.ACCEPTED)

    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        return state
