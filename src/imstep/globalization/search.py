"""How far to go along a direction: the interface of all step searches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

from imstep.globalization.model import LineModel, Trial

NOTABLE = 0.1
"""Deviations of rho from 1 below this are taken as agreement."""


class Reason(Enum):
    """Why a trial was accepted or not; a member's value is its message.

    Example:
        >>> Reason.NON_FINITE.message
        'the trial loss is not finite'
    """

    ACCEPTED = "the loss decreased enough"
    INSUFFICIENT_DECREASE = "the loss decreased too little for the model's promise"
    STEEP = "the slope at the trial is still too steep"
    NON_FINITE = "the trial loss is not finite"

    @property
    def message(self) -> str:
        """A clause that explains the verdict to a reader."""
        return self.value


@dataclass(frozen=True)
class Bracket:
    """An interval of step lengths that holds acceptable ones, within a step.

    Attributes:
        low: the end of lower loss.
        high: the other end, on either side; None while the interval has none yet.
    """

    low: Trial
    high: Trial | None = None


@dataclass(frozen=True)
class SearchState:
    """What a search remembers: plain numbers, to be saved by `dataclasses.asdict`.

    Attributes:
        third_derivative: M >= 0, the estimate of |D³f[e, e, e]| along recent directions e of norm 1.
        radius: Δ > 0, the longest ‖t d‖ that is trusted; may be infinite.
        bracket: from trial to trial of a step; None between steps.
    """

    third_derivative: float = 0.0
    radius: float = math.inf
    bracket: Bracket | None = None


@dataclass(frozen=True)
class Verdict:
    """What a search says about a trial.

    Attributes:
        accepted: whether w + t d becomes the new point.
        step_length: t itself if accepted, else the next one to try.
        rho: (f - f(w + t d)) / q(t); -inf for a non-finite trial, nan where the model promised no decrease.
        taylor_error: E(t) = f(w + t d) - m(t), with its sign.
        state: what to remember.
        reason: why.
    """

    accepted: bool
    step_length: float
    rho: float
    taylor_error: float
    state: SearchState
    reason: Reason


class StepSearch(ABC):
    """A rule for the step length t along a fixed direction d; pure, it neither evaluates nor remembers.

    One step is: `propose` a t; evaluate f(w + t d); `judge` the trial; while it is not accepted, try
    `verdict.step_length` with `verdict.state`; where the trials run out, `settle` for one of them or `reject` the
    step. The slope at a trial is evaluated, too, if the search `needs_slopes`, or where the loss has changed by
    rounding only.

    Example:
        >>> from imstep.globalization import Armijo
        >>> search, model = Armijo(), LineModel(loss=1.0, slope=-1.0, curvature=0.0, norm=1.0)
        >>> state = search.initial()
        >>> t = search.propose(state, model)
        >>> verdict = search.judge(state, model, Trial(t, loss=2.0))
        >>> t, verdict.accepted, verdict.step_length
        (1.0, False, 0.5)
    """

    @property
    def needs_slopes(self) -> bool:
        """Whether every trial is to be evaluated with its slope, for a gradient instead of a loss."""
        return False

    @property
    def needs_derivatives(self) -> bool:
        """Whether the model is to hold the exact second and third derivative along the direction."""
        return False

    @abstractmethod
    def initial(self) -> SearchState:
        """The state before the first step."""

    @abstractmethod
    def propose(self, state: SearchState, model: LineModel) -> float:
        """The first t > 0 to try.

        Raises:
            ValueError: the direction is not one of descent.
        """

    @abstractmethod
    def judge(self, state: SearchState, model: LineModel, trial: Trial) -> Verdict:
        """The verdict on a trial."""

    @abstractmethod
    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        """The state after a step that was given up; `step_length` is the first one tried, the proposal."""

    def full(self, model: LineModel) -> float:
        """The t that it would take if the model were right, without a bound: what a step that falls short missed."""
        return 1.0

    def extend(self, model: LineModel, verdict: Verdict) -> float | None:
        """A longer t to try after an accepted one, or None; it is kept if the loss falls further."""
        return None

    def settle(self, state: SearchState) -> Trial | None:
        """A trial made that will do where no more may be made, though it was not accepted; None if there is none."""
        return None


def require_descent(model: LineModel) -> None:
    """Raise unless the model falls at t = 0."""
    if not model.slope < 0:
        raise ValueError(
            f"the slope gᵀd along a direction of descent is negative, got {model.slope}. "
            "Use -d, or the negative gradient."
        )


def decrease_ratio(model: LineModel, step_length: float, taylor_error: float) -> float:
    """rho = 1 - E(t)/q(t), the loss's decrease over the model's."""
    if not math.isfinite(taylor_error):
        return -math.inf
    promised = model.decrease(step_length)
    return 1 - taylor_error / promised if promised > 0 else math.nan
