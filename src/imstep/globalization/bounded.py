"""Another search with a bound on the step length."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from imstep.globalization.model import LineModel, Trial
from imstep.globalization.search import Reason, SearchState, StepSearch, Verdict


@dataclass(frozen=True)
class Bounded(StepSearch):
    """Another search none of whose trials is longer than a bound, t <= longest.

    A trial at the bound that the search would lengthen is accepted.

    Args:
        search: the other one.
        longest: > 0; infinite for no bound.

    Raises:
        ValueError: the bound is not positive.

    Example:
        >>> from imstep.globalization import Armijo
        >>> model = LineModel(loss=1.0, slope=-1.0, curvature=0.0, norm=1.0)
        >>> Bounded(Armijo(), 0.25).propose(SearchState(), model)
        0.25
    """

    search: StepSearch
    longest: float

    def __post_init__(self) -> None:
        if not self.longest > 0:
            raise ValueError(f"longest, a bound on the step length, must be positive, got {self.longest}.")

    @property
    def needs_slopes(self) -> bool:
        return self.search.needs_slopes

    @property
    def needs_derivatives(self) -> bool:
        return self.search.needs_derivatives

    def initial(self) -> SearchState:
        return self.search.initial()

    def propose(self, state: SearchState, model: LineModel) -> float:
        return min(self.search.propose(state, model), self.longest)

    def judge(self, state: SearchState, model: LineModel, trial: Trial) -> Verdict:
        verdict = self.search.judge(state, model, trial)
        if verdict.accepted or verdict.step_length <= self.longest:
            return verdict
        if verdict.reason is Reason.STEEP and trial.step_length == self.longest:
            rest = replace(verdict.state, bracket=None)
            return replace(verdict, accepted=True, step_length=self.longest, state=rest, reason=Reason.ACCEPTED)
        return replace(verdict, step_length=self.longest)

    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        return self.search.reject(state, model, step_length)

    def full(self, model: LineModel) -> float:
        return self.search.full(model)

    def extend(self, model: LineModel, verdict: Verdict) -> float | None:
        longer = self.search.extend(model, verdict)
        if longer is None or verdict.step_length >= self.longest:
            return None
        return min(longer, self.longest)

    def settle(self, state: SearchState) -> Trial | None:
        return self.search.settle(state)


def bounded(search: StepSearch, longest: float) -> StepSearch:
    """The search within a bound; itself where that is infinite."""
    return search if math.isinf(longest) else Bounded(search, longest)
