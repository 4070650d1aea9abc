"""What benchmarks/minibatch compares: NewtonKrylov.for_batches, a base, parts of that exchanged, and ideas.

The base is what for_batches was when the record was made: whole steps, more of the blend, a higher floor. The ideas use
nothing but what the library offers to everybody.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imstep import NewtonKrylov
from imstep.globalization import Armijo, Damping, LevenbergMarquardt, NormTest, TaylorMonitor
from imstep.optim import (
    BestRateForcing,
    BlendedConjugateGradient,
    ConjugateGradient,
    Cost,
    FixedProducts,
    NewtonSystem,
    Solver,
)
from imstep.optim.direction import Direction

Parameters = list[torch.nn.Parameter]


class AveragedGradients(Solver):
    """Solves for an exponential average of the gradients; afresh where that goes up on the present batch.

    Args:
        decay: weight of the past, in [0, 1).
        solver: of the system.
    """

    def __init__(self, decay: float, solver: Solver) -> None:
        self._decay, self._solver = decay, solver
        self._mean: Tensor | None = None

    def solve(self, system: NewtonSystem) -> Direction:
        gradient = system.gradient
        self._mean = gradient if self._mean is None else torch.lerp(gradient, self._mean, self._decay)
        direction = self._solver.solve(replace(system, gradient=self._mean))
        slope = float(gradient @ direction.vector)
        if slope < 0:
            return replace(direction, slope=slope)
        self._mean = gradient
        return self._solver.solve(system)


class ToldDamping(Damping):
    """λ by a rule, from a number that is told instead of the ratio of actual to predicted decrease."""

    def __init__(self, rule: Damping) -> None:
        self._rule, self.told = rule, math.nan

    @property
    def initial(self) -> float:
        return self._rule.initial

    def update(self, damping: float, rho: float) -> float:
        return damping if math.isnan(self.told) else self._rule.update(damping, self.told)


class NextBatchNewtonKrylov(NewtonKrylov):
    """λ by what a step did to the loss of the next batch, known when that comes; it takes effect a step later."""

    def __init__(self, params: Parameters, lower: float, upper: float, **options: Any) -> None:
        rule = LevenbergMarquardt(initial=0.1, floor=1e-3, lower=lower, upper=upper)
        self._damping = ToldDamping(rule)
        super().__init__(params, **{**options, "damping": self._damping})
        self._before: list[Tensor] = []

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        now, extra = [p.detach().clone() for p in parameters], Cost()
        if self.last_step is not None and self.last_step.accepted:
            with torch.no_grad():
                after = float(closure())  # not charged: the step below evaluates the same
                _set(parameters, self._before)
                before = float(closure())
                _set(parameters, now)
            self._damping.told = (before - after) / self.last_step.predicted_decrease
            extra = Cost(losses=1)
        self._before = now
        loss = super().step(closure)
        self.last_step = replace(self.last_step, cost=self.last_step.cost + extra)
        return loss


def _set(parameters: Parameters, values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


@dataclass(frozen=True)
class Proportional(Damping):
    """λ = factor times what it is told, at least the floor."""

    factor: float
    floor: float = 1e-3

    @property
    def initial(self) -> float:
        return 0.1

    def update(self, damping: float, rho: float) -> float:
        return max(self.factor * rho, self.floor)


class SpreadNewtonKrylov(NewtonKrylov):
    """λ in proportion to the share of noise in ‖g‖², the gradient's variance over ‖g‖², a running mean of it."""

    def __init__(self, params: Parameters, factor: float, decay: float = 0.8, **options: Any) -> None:
        self._damping, self._decay = ToldDamping(Proportional(factor)), decay
        super().__init__(params, **{**options, "damping": self._damping, "variance_every": 3})

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        loss = super().step(closure)
        share = self.last_step.gradient_variance / self.last_step.gradient_norm**2
        if math.isfinite(share):
            old = share if math.isnan(self._damping.told) else self._damping.told
            self._damping.told = self._decay * old + (1 - self._decay) * share
        return loss


@dataclass(frozen=True)
class Side:
    """A configuration.

    Attributes:
        name: in the table.
        make: makes the optimizer.
        part: which share of a batch the curvature sees.
        test: when batches grow; None for never.
    """

    name: str
    make: Callable[[Parameters], torch.optim.Optimizer]
    part: float = 1.0
    test: NormTest | None = None


def _base(parameters: Parameters, kind: type[NewtonKrylov] = NewtonKrylov, **options: Any) -> NewtonKrylov:
    own = {"step": Armijo(), "solver": BlendedConjugateGradient(weight=0.3)}
    return kind.for_batches(parameters, **{**own, "damping": LevenbergMarquardt(initial=0.1, floor=1e-3), **options})


def _changed(name: str, test: NormTest | None = None, **options: Any) -> Side:
    return Side(name, lambda parameters: _base(parameters, **options), test=test)


def _averaging(decay: float) -> Side:
    make = lambda p: _base(p, solver=AveragedGradients(decay, BlendedConjugateGradient(weight=0.3)))
    return Side(f"gradients averaged, decay {decay}", make)


def _next_batch(name: str, lower: float, upper: float) -> Side:
    return Side(name, lambda p: _base(p, NextBatchNewtonKrylov, lower=lower, upper=upper))


def _spread(factor: float) -> Side:
    return Side(f"λ is {factor} times the share of noise", lambda p: _base(p, SpreadNewtonKrylov, factor=factor))


SIDES = (
    Side("`for_batches`", NewtonKrylov.for_batches),
    _changed("the base"),
    _changed("without the blend", solver=ConjugateGradient()),
    _changed("without a floor under λ", damping=LevenbergMarquardt(initial=0.1)),
    _changed("1 product", forcing=FixedProducts(1)),
    _changed("4 products", forcing=FixedProducts(4)),
    _changed("products by best rate", forcing=BestRateForcing()),
    _changed("`step=TaylorMonitor()`", step=TaylorMonitor()),
    _changed("`momentum=True`", momentum=True),
    _changed("warm start from half the last step, no blend", solver=ConjugateGradient(warm_start=0.5)),
    Side("curvature of half the batch", _base, part=0.5),
    Side("curvature of a quarter", _base, part=0.25),
    _changed("batches grow, θ = 1/2", NormTest(theta=0.5), variance_every=3),
    _changed("batches grow, θ = 1", NormTest(theta=1.0), variance_every=3),
    _averaging(0.5),
    _averaging(0.8),
    _next_batch("λ by the next batch", lower=0.25, upper=0.75),
    _next_batch("λ by the next batch, growing only where that loses", lower=0.0, upper=0.25),
    _spread(0.1),
    _spread(0.01),
    Side("`NewtonKrylov` with its defaults", NewtonKrylov),
    Side("Adam, 3e-3", lambda parameters: torch.optim.Adam(parameters, lr=3e-3)),
)
