"""How far to go along a direction: the interface of all step searches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

from imstep.globalization.model import LineModel


class Reason(Enum):
    """Why a trial was accepted or not; a member's value is its message.

    Example:
        >>> Reason.NON_FINITE.message
        'the trial loss is not finite'
    """

    ACCEPTED = "the loss decreased enough"
    INSUFFICIENT_DECREASE = "the loss decreased too little for the model's promise"
    NON_FINITE = "the trial loss is not finite"

    @property
    def message(self) -> str:
        """A clause that explains the verdict to a reader."""
        return self.value


@dataclass(frozen=True)
class SearchState:
    """What a search remembers from step to step: plain floats, to be saved by `dataclasses.asdict`.

    Attributes:
        third_derivative: M >= 0, the estimate of |D³f[e, e, e]| along recent directions e of norm 1.
        radius: Δ > 0, the longest ‖t d‖ that is trusted; may be infinite.
    """

    third_derivative: float = 0.0
    radius: float = math.inf


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

    One step is: `propose` a t; evaluate f(w + t d); `judge` it; while not accepted, try `verdict.step_length`
    with `verdict.state`; or give up with `reject`. Where the loss has changed by rounding only
    (`rounding_level`), evaluate the gradient at the trial and `judge_by_gradient` instead.

    Example:
        >>> from imstep.globalization import Armijo
        >>> search, model = Armijo(), LineModel(loss=1.0, slope=-1.0, curvature=0.0, norm=1.0)
        >>> state = search.initial()
        >>> t = search.propose(state, model)
        >>> verdict = search.judge(state, model, t, trial_loss=2.0)
        >>> t, verdict.accepted, verdict.step_length
        (1.0, False, 0.5)
    """

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
    def weigh(self, state: SearchState, model: LineModel, step_length: float, taylor_error: float) -> Verdict:
        """The verdict on a trial whose Taylor error is known; not finite if the trial was not."""

    @abstractmethod
    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        """The state after a step that was given up; `step_length` is the first one tried, the proposal."""

    def extend(self, model: LineModel, verdict: Verdict) -> float | None:
        """A longer t to try after an accepted one, or None; it is kept if the loss falls further."""
        return None

    def judge(self, state: SearchState, model: LineModel, step_length: float, trial_loss: float) -> Verdict:
        """The verdict on a trial by its loss f(w + t d)."""
        return self.weigh(state, model, step_length, model.error_by_loss(step_length, trial_loss))

    def judge_by_gradient(
        self, state: SearchState, model: LineModel, step_length: float, trial_slope: float
    ) -> Verdict:
        """The verdict on a trial by its slope g(w + t d)·d."""
        return self.weigh(state, model, step_length, model.error_by_gradient(step_length, trial_slope))

    def rounding_level(self, model: LineModel, trial_loss: float) -> bool:
        """Whether |f(w + t d) - f| <= 10 u |f|: the two losses say nothing about the step."""
        return abs(trial_loss - model.loss) <= model.rounding


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
