"""Rivals as their papers run them: after a first optimizer, and at points that stay for some steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from imstep.runs.steppers import Stepper, StepResult
from imstep.tasks import AnyBatch, Problem


class Then(Stepper):
    """One optimizer for some steps, then another, which is made where that one ends.

    Args:
        first: makes the first steps.
        steps: how many, >= 1.
        make: makes the other.
    """

    def __init__(self, first: Stepper, steps: int, make: Callable[[], Stepper]) -> None:
        self._now, self._left, self._make = first, steps, make

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._now.optimizer

    def evaluating(self) -> AbstractContextManager[None]:
        return self._now.evaluating()

    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        if self._left == 0:
            self._now = self._make()
        self._left -= 1
        return self._now.step(problem, batch)


class Kept(Stepper):
    """Some steps at the same points, for methods that learn from how the gradient changes.

    Args:
        make: makes the optimizer.
        steps: at the same points, >= 1.
        anew: whether the optimizer begins anew at new points; else what it has learnt stays.
    """

    def __init__(self, make: Callable[[], Stepper], steps: int, anew: bool) -> None:
        self._make, self._steps, self._anew = make, steps, anew
        self._stepper, self._left = make(), 0
        self._batch: AnyBatch

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._stepper.optimizer

    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        if self._left == 0:
            self._batch, self._left = batch, self._steps
            if self._anew:
                self._stepper = self._make()
        self._left -= 1
        return self._stepper.step(problem, self._batch)
