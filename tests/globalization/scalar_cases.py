"""Functions of one variable with their derivatives, and the loop of trials on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from imstep.globalization import LineModel, SearchState, StepSearch, Trial
from imstep.optim.trials import Line, Trials, try_steps


@dataclass(frozen=True)
class Scalar:
    """f of one variable with its first two derivatives; a direction d is a number."""

    f: Callable[[float], float]
    df: Callable[[float], float]
    ddf: Callable[[float], float] = lambda x: 0.0

    def model(self, x: float, d: float = 1.0) -> LineModel:
        return LineModel(self.f(x), self.df(x) * d, self.ddf(x) * d * d, abs(d))

    def trial(self, x: float, d: float, t: float) -> Trial:
        return Trial(t, self.f(x + t * d), self.df(x + t * d) * d)

    def line(self, x: float, d: float = 1.0) -> Line:
        gradient = lambda t: (self.f(x + t * d), self.df(x + t * d) * d)
        return Line(self.model(x, d), lambda t: self.f(x + t * d), gradient)

    def step(
        self, search: StepSearch, x: float, d: float = 1.0, state: SearchState | None = None, limit: int = 12
    ) -> Trials:
        return try_steps(search, search.initial() if state is None else state, self.line(x, d), limit)


def minimise(problem: Scalar, x: float, search: StepSearch, steps: int = 100, tolerance: float = 1e-8):
    """Newton directions (steepest descent where curvature is not positive): x, the losses, the count of trials."""
    state = search.initial()
    losses, trials = [problem.f(x)], 0
    for _ in range(steps):
        if abs(problem.df(x)) < tolerance:
            break
        direction = -problem.df(x) / problem.ddf(x) if problem.ddf(x) > 0 else -problem.df(x)
        made = problem.step(search, x, direction, state, limit=20)
        state, trials = made.state, trials + made.count
        x += made.step_length * direction if made.accepted else 0.0
        losses.append(problem.f(x))
    return x, losses, trials


LOG_COSH = Scalar(lambda x: abs(x) + math.log1p(math.exp(-2 * abs(x))), math.tanh, lambda x: 1 - math.tanh(x) ** 2)
DOUBLE_WELL = Scalar(lambda x: (x * x - 1) ** 2, lambda x: 4 * x * (x * x - 1), lambda x: 12 * x * x - 4)
EXPONENTIAL = Scalar(lambda x: math.exp(x) - x if x < 700 else math.inf, lambda x: math.expm1(min(x, 700)), math.exp)
BARRIER = Scalar(
    lambda x: x - math.log(x) if x > 0 else math.nan, lambda x: 1 - 1 / x if x > 0 else math.nan, lambda x: 1 / (x * x)
)


def _wiggly(beta: float, waves: int) -> Scalar:
    def base(a):
        return abs(1 - a) if abs(1 - a) >= beta else (a - 1) ** 2 / (2 * beta) + beta / 2

    def d_base(a):
        return math.copysign(1, a - 1) if abs(1 - a) >= beta else (a - 1) / beta

    rate = waves * math.pi / 2
    return Scalar(
        lambda a: base(a) + (1 - beta) / rate * math.sin(rate * a),
        lambda a: d_base(a) + (1 - beta) * math.cos(rate * a),
    )


def _yanai(b1: float, b2: float) -> Scalar:
    g1, g2 = (math.sqrt(1 + b * b) - b for b in (b1, b2))
    return Scalar(
        lambda a: g1 * math.hypot(1 - a, b2) + g2 * math.hypot(a, b1),
        lambda a: g1 * (a - 1) / math.hypot(1 - a, b2) + g2 * a / math.hypot(a, b1),
    )


MORE_THUENTE = {
    "1": Scalar(lambda a: -a / (a * a + 2), lambda a: (a * a - 2) / (a * a + 2) ** 2),
    "2": Scalar(
        lambda a: (a + 0.004) ** 5 - 2 * (a + 0.004) ** 4, lambda a: 5 * (a + 0.004) ** 4 - 8 * (a + 0.004) ** 3
    ),
    "3": _wiggly(0.01, 39),
    "4": _yanai(0.001, 0.001),
    "5": _yanai(0.01, 0.001),
    "6": _yanai(0.001, 0.01),
}
"""Moré and Thuente, ACM Transactions on Mathematical Software 20 (1994), 286-307, section 5."""
