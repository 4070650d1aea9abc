"""How far to go: trial steps along a fixed direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from imstep.globalization import LineModel, SearchState, StepSearch, Verdict
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


def try_steps(
    search: StepSearch,
    state: SearchState,
    model: LineModel,
    loss_at: Callable[[float], float],
    slope_at: Callable[[float], float],
    limit: int,
) -> Trials:
    """Propose, evaluate and judge until a trial is accepted, at most ``limit`` times.

    Where the losses differ by rounding only, the slope at the trial decides, for a gradient.
    """
    first = step_length = search.propose(state, model)
    cost = Cost()
    for count in range(1, limit + 1):
        loss = loss_at(step_length)
        cost += Cost(losses=1)
        if math.isfinite(loss) and search.rounding_level(model, loss):
            verdict = search.judge_by_gradient(state, model, step_length, slope_at(step_length))
            cost += Cost(gradients=1)
        else:
            verdict = search.judge(state, model, step_length, loss)
        if verdict.accepted:
            found = Trials(True, step_length, loss, verdict.rho, verdict.taylor_error, count, verdict.state, cost)
            return _go_on(search, state, model, verdict, found, loss_at, limit)
        state = verdict.state
        if count < limit:
            step_length = verdict.step_length
    state = search.reject(state, model, first)
    return Trials(False, step_length, model.loss, verdict.rho, verdict.taylor_error, limit, state, cost)


def _go_on(
    search: StepSearch,
    state: SearchState,
    model: LineModel,
    verdict: Verdict,
    found: Trials,
    loss_at: Callable[[float], float],
    limit: int,
) -> Trials:
    """Lengthen an accepted step as long as the search suggests it and the loss falls; the best trial is found last."""
    while found.count < limit and (longer := search.extend(model, verdict)) is not None:
        loss = loss_at(longer)
        cost, count = found.cost + Cost(losses=1), found.count + 1
        if not loss < found.loss:
            return replace(found, cost=cost, count=count)
        verdict = search.judge(state, model, longer, loss)
        # Beyond twice the minimiser the model promises nothing, so there is nothing to judge it by.
        kept = verdict.state if verdict.accepted else found.state
        found = Trials(True, longer, loss, verdict.rho, verdict.taylor_error, count, kept, cost)
    return found


def try_escape(
    state: SearchState, model: LineModel, loss_at: Callable[[float], float], length: float, acceptance: float = 1e-4
) -> Trials:
    """Leave a stationary point along negative curvature: the longest of a geometric sequence of steps that keeps
    a fraction ``acceptance`` of the promised decrease.

    Source: backtracking, Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 3.1; lengths are our choice.
    """
    step_length = length / model.norm
    rho = error = math.nan
    for count in range(1, ESCAPE_TRIALS + 1):
        loss = loss_at(step_length)
        error = model.error_by_loss(step_length, loss)
        rho = (model.loss - loss) / model.decrease(step_length)
        if math.isfinite(loss) and rho >= acceptance and loss < model.loss:
            return Trials(True, step_length, loss, rho, error, count, state, Cost(losses=count))
        step_length *= ESCAPE_SHRINK
    return Trials(False, step_length, model.loss, rho, error, count, state, Cost(losses=count))
