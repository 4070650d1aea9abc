"""How far to go: trial steps along a fixed direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from imstep.globalization import LineModel, SearchState, StepSearch, Trial, Verdict, decrease_ratio
from imstep.optim.record import Cost

ESCAPE_TRIALS = 40
ESCAPE_SHRINK = 0.25


@dataclass(frozen=True)
class Trials:
    """What came of the trials.

    Attributes:
        accepted: whether the last trial is the new point.
        step_length: of the last trial.
        loss: at the last trial; at the start where nothing was accepted.
        rho, taylor_error: of the last trial.
        count: how many were made.
        state: of the search, for the next step.
        cost: evaluations spent.
    """

    accepted: bool
    step_length: float
    loss: float
    rho: float
    taylor_error: float
    count: int
    state: SearchState
    cost: Cost


@dataclass(frozen=True)
class Line:
    """The loss along a direction, and what looking at it costs.

    Attributes:
        model: its quadratic model.
        loss_at: t -> f(w + t d).
        gradient_at: t -> (f(w + t d), g(w + t d)·d).
    """

    model: LineModel
    loss_at: Callable[[float], float]
    gradient_at: Callable[[float], tuple[float, float]]

    def evaluate(self, step_length: float, slope: bool) -> tuple[Trial, Cost]:
        """A trial, with its slope if asked for, or where the losses differ by rounding only."""
        if slope:
            return Trial(step_length, *self.gradient_at(step_length)), Cost(gradients=1)
        trial = Trial(step_length, self.loss_at(step_length))
        if not self.model.rounding_level(trial):
            return trial, Cost(losses=1)
        return replace(trial, slope=self.gradient_at(step_length)[1]), Cost(losses=1, gradients=1)


def try_steps(search: StepSearch, state: SearchState, line: Line, limit: int, longest: float = math.inf) -> Trials:
    """Propose, evaluate and judge until a trial is accepted, at most ``limit`` times, with no t above ``longest``."""
    model, current, cost = line.model, state, Cost()
    first = step_length = min(search.propose(state, model), longest)
    for count in range(1, limit + 1):
        trial, spent = line.evaluate(step_length, search.needs_slopes)
        cost += spent
        verdict = search.judge(current, model, trial)
        if verdict.accepted:
            found = Trials(True, step_length, trial.loss, verdict.rho, verdict.taylor_error, count, verdict.state, cost)
            return _go_on(search, current, line, verdict, found, limit, longest)
        current = verdict.state
        if step_length >= longest and verdict.step_length > longest:
            break
        if count < limit:
            step_length = min(verdict.step_length, longest)
    settled, current = search.settle(current), search.reject(current, model, first)
    if settled is None:
        return Trials(False, step_length, model.loss, verdict.rho, verdict.taylor_error, count, current, cost)
    error = model.taylor_error(settled)
    rho = decrease_ratio(model, settled.step_length, error)
    return Trials(True, settled.step_length, settled.loss, rho, error, count, current, cost)


def _go_on(
    search: StepSearch, state: SearchState, line: Line, verdict: Verdict, found: Trials, limit: int, longest: float
) -> Trials:
    """Lengthen an accepted step as long as the search suggests it and the loss falls; the best trial is found last."""
    model = line.model
    while found.count < limit and (longer := search.extend(model, verdict)) is not None and longer <= longest:
        loss = line.loss_at(longer)
        cost, count = found.cost + Cost(losses=1), found.count + 1
        trial = Trial(longer, loss)
        if not loss < found.loss or model.rounding_level(trial):
            return replace(found, cost=cost, count=count)
        verdict = search.judge(state, model, trial)
        # Beyond twice the minimiser the model promises nothing, so there is nothing to judge it by.
        kept = verdict.state if verdict.accepted else found.state
        found = Trials(True, longer, loss, verdict.rho, verdict.taylor_error, count, kept, cost)
    return found


def try_escape(
    state: SearchState,
    model: LineModel,
    loss_at: Callable[[float], float],
    length: float,
    least: float = 0.0,
    acceptance: float = 1e-4,
) -> Trials:
    """Leave a stationary point along negative curvature: the longest of a geometric sequence of steps that keeps
    a fraction ``acceptance`` of the promised decrease, as long as that is promised to be more than ``least``.

    Source: backtracking, Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 3.1; lengths are our choice.
    """
    step_length, count = length / model.norm, 0
    rho = error = math.nan
    while count < ESCAPE_TRIALS and model.decrease(step_length) > least:
        loss, count = loss_at(step_length), count + 1
        error = model.taylor_error(Trial(step_length, loss))
        rho = (model.loss - loss) / model.decrease(step_length)
        if math.isfinite(loss) and rho >= acceptance and loss < model.loss:
            return Trials(True, step_length, loss, rho, error, count, state, Cost(losses=count))
        step_length *= ESCAPE_SHRINK
    return Trials(False, step_length, model.loss, rho, error, count, state, Cost(losses=count))
