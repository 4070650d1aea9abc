"""The strong Wolfe conditions: enough decrease, and a slope that is nearly spent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from imstep.globalization.model import LineModel, Trial
from imstep.globalization.search import (
    Bracket,
    Reason,
    SearchState,
    StepSearch,
    Verdict,
    decrease_ratio,
    require_descent,
)

_MARGIN = 0.1  # least distance of an interpolated trial from the ends of its bracket, in lengths of the bracket


@dataclass(frozen=True)
class StrongWolfe(StepSearch):
    """Find a t with both strong Wolfe conditions, from t = 1, by bracketing and cubic interpolation.

        f(w + t d) <= f + c1 t s,      |g(w + t d)·d| <= c2 |s|

    Trials lengthen until they bracket such a t: a trial without enough decrease, no better than the one before, or
    with a positive slope closes the bracket. Then they are the minimisers of the cubic through losses and slopes of
    its ends, of a quadratic where a slope is not finite, or the middle where that lies within a tenth of an end.

    Where the trials run out, the best with enough decrease will do.

    Args:
        c1: fraction of the linear decrease to ask for, in (0, 1).
        c2: fraction of the slope that may remain, in (c1, 1).
        lengthen: least factor between trials that lengthen, > 1; five times that is the largest.

    Raises:
        ValueError: an argument is out of range.

    Cost: a gradient per trial.

    Source: Nocedal & Wright, Numerical Optimization (2nd ed.), Algorithms 3.5 and 3.6, and (3.59); constants as given
    there for Newton methods; factors and margin are our choice.

    Example:
        >>> model = LineModel(loss=1.0, slope=-1.0, curvature=0.0, norm=1.0)
        >>> StrongWolfe().judge(SearchState(), model, Trial(1.0, loss=0.5, slope=-0.1)).accepted
        True
    """

    c1: float = 1e-4
    c2: float = 0.9
    lengthen: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.c1 < self.c2 < 1:
            raise ValueError(f"c1 and c2 must satisfy 0 < c1 < c2 < 1, got {self.c1} and {self.c2}.")
        if not 1 < self.lengthen < math.inf:
            raise ValueError(f"lengthen, a factor between trials, is above 1, got {self.lengthen}.")

    @property
    def needs_slopes(self) -> bool:
        return True

    def initial(self) -> SearchState:
        return SearchState()

    def propose(self, state: SearchState, model: LineModel) -> float:
        require_descent(model)
        return 1.0

    def judge(self, state: SearchState, model: LineModel, trial: Trial) -> Verdict:
        t, slope, change = trial.step_length, _slope(trial), model.change(trial)
        error = model.taylor_error(trial)
        rho = decrease_ratio(model, t, error)
        low, high = _ends(state, model)
        if not (math.isfinite(change) and math.isfinite(slope)):
            closed, reason = Bracket(low, trial), Reason.NON_FINITE
        elif change > self.c1 * t * model.slope or change > model.change(low) + _rounding(model, change):
            closed, reason = Bracket(low, trial), Reason.INSUFFICIENT_DECREASE
        elif abs(slope) <= self.c2 * -model.slope:
            return Verdict(True, t, rho, error, replace(state, bracket=None), Reason.ACCEPTED)
        else:
            # The minimiser lies on the side to which the trial slopes: between it and the old low end, or beyond.
            towards_high = slope < 0 if high is None else slope * (high.step_length - t) < 0
            closed, reason = Bracket(trial, high if towards_high else low), Reason.STEEP
        following = self._longer(model, low, trial) if closed.high is None else _within(model, closed)
        return Verdict(False, following, rho, error, replace(state, bracket=closed), reason)

    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        return replace(state, bracket=None)

    def settle(self, state: SearchState) -> Trial | None:
        low = state.bracket.low if state.bracket is not None else None
        return low if low is not None and low.step_length > 0 else None

    def _longer(self, model: LineModel, before: Trial, trial: Trial) -> float:
        """The next trial while slopes are still negative."""
        t = trial.step_length
        suggested = _minimizer(model, before, trial)
        suggested = suggested if suggested > t else math.inf
        return min(max(suggested, self.lengthen * t), 5 * self.lengthen * t)


def _ends(state: SearchState, model: LineModel) -> tuple[Trial, Trial | None]:
    if state.bracket is None:
        return Trial(0.0, model.loss, model.slope), None
    return state.bracket.low, state.bracket.high


def _slope(trial: Trial) -> float:
    if trial.slope is None:
        raise ValueError("the strong Wolfe conditions need the slope at a trial. Evaluate the gradient there.")
    return trial.slope


def _within(model: LineModel, bracket: Bracket) -> float:
    """A trial inside a closed bracket."""
    low, high = bracket.low, bracket.high
    assert high is not None
    width = high.step_length - low.step_length
    if not math.isfinite(model.change(high)):
        return low.step_length + _MARGIN * width
    share = (_minimizer(model, low, high) - low.step_length) / width
    share = 0.5 if math.isnan(share) else min(max(share, _MARGIN), 1 - _MARGIN)
    return low.step_length + share * width


def _rounding(model: LineModel, change: float) -> float:
    """What two losses may differ by though slopes tell that they are equal."""
    return model.rounding + 10 * model.unit_roundoff * abs(change)


def _minimizer(model: LineModel, a: Trial, b: Trial) -> float:
    """Of the cubic through two losses and slopes; of a quadratic where the slope at b is not finite; nan if none."""
    width = b.step_length - a.step_length
    rise = (model.change(b) - model.change(a)) / width
    at_a, at_b = _slope(a), _slope(b)
    if not math.isfinite(at_b):
        bend = 2 * (rise - at_a)
        return a.step_length - at_a * width / bend if bend * width > 0 else math.nan
    d1 = at_a + at_b - 3 * rise
    square = d1 * d1 - at_a * at_b
    if square < 0:
        return math.nan
    d2 = math.copysign(math.sqrt(square), width)
    below = at_b - at_a + 2 * d2
    return b.step_length - width * (at_b + d2 - d1) / below if below != 0 else math.nan
