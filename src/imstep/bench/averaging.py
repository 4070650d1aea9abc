"""Any optimizer, evaluated at the running average of its iterates; a learning rate that falls along a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from imstep.runs.steppers import Stepper, StepResult
from imstep.tasks import AnyBatch, Problem

__all__ = ["EvaluatedAtAverage", "cosine"]


def cosine(done: float) -> float:
    """Factor on a learning rate: from 1 at the start of a run to 0 at its end, along half a cosine.

    >>> [round(cosine(x), 2) for x in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    return (1 + math.cos(math.pi * min(done, 1.0))) / 2


class EvaluatedAtAverage(Stepper):
    """Another stepper's steps; what is evaluated is an exponential average of the parameters.

    Args:
        stepper: makes the steps.
        model: whose parameters it moves.
        decay: weight of the past after a step that took one gradient, in [0, 1); after one of k it is that to the power
            of k, so that averages reach back equally far whatever steps take. The first steps count evenly.
    """

    def __init__(self, stepper: Stepper, model: nn.Module, decay: float) -> None:
        self._stepper, self._model, self._decay = stepper, model, decay
        self._steps, self._share = 0, 1.0
        self._average = AveragedModel(model, multi_avg_fn=self._take)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._stepper.optimizer

    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        result = self._stepper.step(problem, batch)
        self._steps += 1
        self._share = max(1 - self._decay**result.cost, 1 / self._steps)
        self._average.update_parameters(self._model)
        return result

    def _take(self, average: Any, parameters: Any, count: Any) -> None:
        torch._foreach_lerp_(average, parameters, self._share)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for p, q in zip(self._model.parameters(), self._average.module.parameters(), strict=True):
                p.data, q.data = q.data, p.data
