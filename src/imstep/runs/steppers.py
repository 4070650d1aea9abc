"""Optimizers that report what a step cost.

Cost is counted in gradient-equivalents of the batch at hand: a forward and a backward pass are 1, a
forward pass alone is 1/3 (a backward pass does twice the matrix products of a forward pass).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from imstep.curvature import StructuralDamping
from imstep.curvature.domain import raised_in
from imstep.optim import LeastSquares, StepOutcome
from imstep.optim.stepwise import StepwiseOptimizer
from imstep.runs.passing import OptimizerError
from imstep.tasks import AnyBatch, Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "LOSS_COST",
    "AveragedStepper",
    "CheckedStepper",
    "GradientStepper",
    "LBFGSStepper",
    "RefusedError",
    "StepResult",
    "Stepper",
    "StepwiseStepper",
]

LOSS_COST = 1 / 3
"""Gradient-equivalents of one forward pass."""


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

    grows = False
    """Whether the number of points of a step may follow from how its losses compare with those of others."""

    @abstractmethod
    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        """Update the parameters once by what `batch` says."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Within it, the problem's model is the one to evaluate: at the last parameters, unless a stepper says else."""
        return nullcontext()

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, whose state is saved and restored."""


class GradientStepper(Stepper):
    """One gradient a step: Adam, SGD and their kind. A loss that is not finite moves nothing.

    Raises:
        RefusedError: at a step: the optimizer does not take the gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        self._optimizer.zero_grad(set_to_none=True)
        loss = problem.closure(batch)()
        value = loss.item()
        if not math.isfinite(value):
            return StepResult(value, LOSS_COST, losses=1, status="non_finite")
        loss.backward()
        try:
            self._optimizer.step()
        except (RuntimeError, TypeError, ValueError) as error:  # one of another package may want other gradients
            raise RefusedError(f"{type(self._optimizer).__name__}.step() ended in {error!r}.") from error
        return StepResult(value, 1.0, gradients=1)


class _NonFiniteStartError(Exception):
    """The loss at the start of an L-BFGS step is not finite."""

    def __init__(self, loss: float) -> None:
        self.loss = loss


class LBFGSStepper(Stepper):
    """torch's L-BFGS: a step is up to `max_iter` iterations; each evaluation of its closure is a gradient.

    Args:
        optimizer: makes the iterations.
        weight_decay: λ >= 0 of a penalty ½λ‖w‖² that is added to the loss; torch's has none.
    """

    def __init__(self, optimizer: torch.optim.LBFGS, weight_decay: float = 0.0) -> None:
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a number of at least 0, got {weight_decay}.")
        self._optimizer, self._decay = optimizer, weight_decay

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        evaluate, calls = problem.closure(batch), 0

        def closure() -> torch.Tensor:
            nonlocal calls
            self._optimizer.zero_grad(set_to_none=True)
            loss = evaluate()
            if calls == 0 and not math.isfinite(loss.detach().item()):
                # torch would go on and write nan into the parameters; its state is untouched up to here.
                raise _NonFiniteStartError(loss.detach().item())
            calls += 1
            if self._decay:
                loss = loss + self._decay / 2 * sum(p.square().sum() for p in problem.parameters)
            loss.backward()
            return loss

        try:
            value = self._optimizer.step(closure).detach().item()
        except _NonFiniteStartError as start:
            return StepResult(start.loss, LOSS_COST, losses=1, status="non_finite")
        return StepResult(value, float(calls), gradients=calls)


class RefusedError(OptimizerError):
    """An optimizer that refuses the problem at its first step, such as a dense matrix of too many parameters."""


class StepwiseStepper(Stepper):
    """imstep's optimizers; their own record says what a step cost and how it ended.

    Args:
        optimizer: which makes the steps.
        process_group: its own, whose processes share out each batch; None for one process.
        structural: weight of the damping of a recurrent problem's hidden states, >= 0.

    Raises:
        RefusedError: at a step: the optimizer does not take the problem.
    """

    def __init__(
        self, optimizer: StepwiseOptimizer, process_group: ProcessGroup | None = None, structural: float = 0.0
    ) -> None:
        self._optimizer, self._group, self._structural = optimizer, process_group, structural

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        try:
            self._move(problem, batch)
        except ValueError as error:
            if type(error) is not ValueError or not raised_in(error).startswith("imstep."):
                raise  # the program of a task has raised it
            raise RefusedError(str(error)) from error
        record = self._optimizer.last_step
        assert record is not None  # a step was just taken
        # A step that moved is told apart by why its Krylov iteration ended; one that did not, by its outcome.
        word = str(record.status if record.accepted and record.status is not None else record.outcome)
        return StepResult(
            record.loss,
            record.cost.gradient_equivalents,
            gradients=record.cost.gradients + record.cost.linearisations,
            products=record.cost.products,
            losses=record.cost.losses,
            new_loss=record.new_loss,
            status="quasi_newton" if record.quasi_newton else word,
            converged=record.outcome is StepOutcome.CONVERGED,
            record=record.to_dict(),
        )

    def _move(self, problem: Problem, batch: AnyBatch) -> None:
        closure = self._part(problem, batch)
        if self._structural > 0:
            closure = StructuralDamping(*problem.states, weight=self._structural)(closure)
        self._optimizer.step(closure)

    def _part(self, problem: Problem, batch: Any) -> Any:
        """What this process evaluates of a batch."""
        if self._group is None:
            return problem.closure(batch)
        return problem.share(batch, dist.get_rank(self._group), dist.get_world_size(self._group))


class CheckedStepper(StepwiseStepper):
    """Least squares, which see at other points whether a step holds there, where all steps have the same points."""

    grows = True
    _optimizer: LeastSquares

    def _move(self, problem: Problem, batch: AnyBatch) -> None:
        elsewhere = problem.elsewhere
        check = None if elsewhere is None else self._part(problem, elsewhere)
        self._optimizer.step(self._part(problem, batch), check=check)


class AveragedStepper(StepwiseStepper):
    """An optimizer that keeps an average of its iterates, which is what is evaluated."""

    def evaluating(self) -> AbstractContextManager[None]:
        return self._optimizer.averaged()
