"""The optimizers that can be named, each made to report what a step cost.

Cost is counted in gradient-equivalents of the batch at hand: a forward and a backward pass are 1, a
forward pass alone is 1/3 (a backward pass does twice the matrix products of a forward pass).
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from imstep.tasks import Batch, Problem

__all__ = [
    "LOSS_COST",
    "OPTIMIZERS",
    "OptimizerError",
    "OptimizerSpec",
    "StepResult",
    "Stepper",
    "get_optimizer",
]

LOSS_COST = 1 / 3
"""Gradient-equivalents of one forward pass."""


class OptimizerError(ValueError):
    """No such optimizer, or it does not take such an option; the message lists what there is."""


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        loss: loss on the batch at the start of the step.
        cost: gradient-equivalents of this batch.
        gradients: forward and backward passes.
        products: curvature products.
        losses: forward passes alone.
        new_loss: loss on the batch at the end, when the optimizer knows it without asking again.
        status: how the step ended in the optimizer's words, or None.
        converged: the optimizer sees nothing left to do on this batch.
        record: the optimizer's own record, JSON-able, or None.
    """

    loss: float
    cost: float
    gradients: int = 0
    products: int = 0
    losses: int = 0
    new_loss: float | None = None
    status: str | None = None
    converged: bool = False
    record: Mapping[str, Any] | None = None


class Stepper(ABC):
    """An optimizer bound to a problem's parameters: makes steps, and says what they cost."""

    @abstractmethod
    def step(self, problem: Problem, batch: Batch) -> StepResult:
        """Update the parameters once by what `batch` says."""

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, whose state is saved and restored."""


class GradientStepper(Stepper):
    """One gradient a step: Adam, SGD and their kind. A loss that is not finite moves nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, problem: Problem, batch: Batch) -> StepResult:
        self._optimizer.zero_grad(set_to_none=True)
        loss = problem.closure(batch)()
        value = loss.item()
        if not _finite(value):
            return StepResult(value, LOSS_COST, losses=1, status="non_finite")
        loss.backward()
        self._optimizer.step()
        return StepResult(value, 1.0, gradients=1)


class LBFGSStepper(Stepper):
    """torch's L-BFGS: a step is up to `max_iter` iterations; each evaluation of its closure is a gradient."""

    def __init__(self, optimizer: torch.optim.LBFGS) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, problem: Problem, batch: Batch) -> StepResult:
        evaluate, calls = problem.closure(batch), 0

        def closure() -> torch.Tensor:
            nonlocal calls
            self._optimizer.zero_grad(set_to_none=True)
            loss = evaluate()
            if calls == 0 and not _finite(loss.detach().item()):
                # torch would go on and write nan into the parameters; its state is untouched up to here.
                raise _NonFiniteStartError(loss.detach().item())
            calls += 1
            loss.backward()
            return loss

        try:
            value = self._optimizer.step(closure).detach().item()
        except _NonFiniteStartError as start:
            return StepResult(start.loss, LOSS_COST, losses=1, status="non_finite")
        return StepResult(value, float(calls), gradients=calls)


class _NonFiniteStartError(Exception):
    """The loss at the start of an L-BFGS step is not finite."""

    def __init__(self, loss: float) -> None:
        self.loss = loss


def _finite(value: float) -> bool:
    return value - value == 0.0


@dataclass(frozen=True)
class OptimizerSpec:
    """A named optimizer and the options it takes.

    Args:
        name: what the command line calls it.
        title: for tables and legends.
        description: one sentence.
        make: `make(problem, options)` -> Stepper; `options` has every key of `defaults`.
        defaults: the options and their values when not given.
        learning_rates: what a sweep tries; empty if there is nothing to tune.
        full_batch: whether it is meant for the full batch when no batch size is asked for.
    """

    name: str
    title: str
    description: str
    make: Callable[[Problem, Mapping[str, float]], Stepper]
    defaults: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    full_batch: bool = False

    def resolve(self, options: Mapping[str, float] | None = None) -> dict[str, float]:
        """`defaults` overridden by `options`.

        Raises:
            OptimizerError: an option that this optimizer does not have.
        """
        given = dict(options or {})
        unknown = [key for key in given if key not in self.defaults]
        if unknown:
            known = ", ".join(f"{key}={value:g}" for key, value in self.defaults.items()) or "none"
            raise OptimizerError(f"{self.name} has no option {unknown[0]!r}. Its options: {known}.")
        return {**self.defaults, **given}

    def create(self, problem: Problem, **options: float) -> Stepper:
        """A fresh optimizer of the problem's parameters.

        Raises:
            OptimizerError: an unknown option, or a value that the optimizer refuses.
        """
        resolved = self.resolve(options)
        try:
            return self.make(problem, resolved)
        except ValueError as error:
            raise OptimizerError(f"{self.name} refuses {resolved}: {error}") from error


def _adam(problem: Problem, options: Mapping[str, float]) -> Stepper:
    betas = (options["beta1"], options["beta2"])
    return GradientStepper(torch.optim.Adam(problem.parameters, lr=options["lr"], betas=betas))


def _sgd(problem: Problem, options: Mapping[str, float]) -> Stepper:
    return GradientStepper(
        torch.optim.SGD(
            problem.parameters,
            lr=options["lr"],
            momentum=options["momentum"],
            nesterov=options["momentum"] > 0,
        )
    )


def _lbfgs(problem: Problem, options: Mapping[str, float]) -> Stepper:
    return LBFGSStepper(
        torch.optim.LBFGS(
            problem.parameters,
            lr=options["lr"],
            history_size=int(options["history"]),
            max_iter=int(options["max_iter"]),
            # torch's defaults (1e-7, 1e-9) end steps early and stall the method before its best loss.
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
    )


_ALL = (
    OptimizerSpec(
        "adam",
        "Adam",
        "Kingma and Ba 2015; one gradient a step.",
        _adam,
        {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999},
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
    ),
    OptimizerSpec(
        "lbfgs",
        "L-BFGS",
        "torch's L-BFGS with the strong Wolfe line search; every evaluation inside a step is counted.",
        _lbfgs,
        {"lr": 1.0, "history": 100, "max_iter": 20},
        full_batch=True,
    ),
    OptimizerSpec(
        "sgd",
        "SGD, Nesterov momentum",
        "Stochastic gradient descent with Nesterov momentum; one gradient a step.",
        _sgd,
        {"lr": 0.1, "momentum": 0.9},
        learning_rates=(0.03, 0.1, 0.3, 1.0),
    ),
)

OPTIMIZERS: dict[str, OptimizerSpec] = {spec.name: spec for spec in _ALL}


def get_optimizer(name: str) -> OptimizerSpec:
    """The optimizer of that name.

    Raises:
        OptimizerError: there is none; names the nearest and lists all.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise OptimizerError(f"there is no optimizer {name!r}.{hint} Optimizers: {', '.join(OPTIMIZERS)}.")
