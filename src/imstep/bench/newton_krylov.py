"""NewtonKrylov as one of the optimizers that can be named."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from imstep.bench.steppers import Stepper, StepResult
from imstep.globalization import LevenbergMarquardt, TaylorMonitor
from imstep.optim import (
    ExactHessian,
    GaussNewtonFirst,
    Kronecker,
    NewtonKrylov,
    NoPreconditioning,
    StepOutcome,
)
from imstep.tasks import Batch, Problem

__all__ = ["OPTIONS", "NewtonKrylovStepper", "make_newton_krylov"]

OPTIONS: Mapping[str, float] = {
    "theta": TaylorMonitor().theta,
    "damping": LevenbergMarquardt().initial,
    "hessian": 0.0,
    "kronecker": 1.0,
}
"""theta and damping are numbers; hessian=1 asks for the exact Hessian, kronecker=0 for no preconditioner."""


class NewtonKrylovStepper(Stepper):
    """imstep's optimizer; its own record says what a step cost and how it ended."""

    def __init__(self, optimizer: NewtonKrylov) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, problem: Problem, batch: Batch) -> StepResult:
        self._optimizer.step(problem.closure(batch))
        record = self._optimizer.last_step
        assert record is not None  # a step was just taken
        # A step that moved is told apart by why its Krylov iteration ended; one that did not, by its outcome.
        word = record.status if record.accepted and record.status is not None else record.outcome
        return StepResult(
            record.loss,
            record.cost.gradient_equivalents,
            gradients=record.cost.gradients + record.cost.linearisations,
            products=record.cost.products,
            losses=record.cost.losses,
            new_loss=record.new_loss,
            status=str(word),
            converged=record.outcome is StepOutcome.CONVERGED,
            record=record.to_dict(),
        )


def make_newton_krylov(problem: Problem, options: Mapping[str, float]) -> Stepper:
    """The optimizer with its strategies chosen by numbers.

    Args:
        problem: whose parameters are trained.
        options: has every key of `OPTIONS`.

    Raises:
        ValueError: a number is out of range.
    """
    for name in ("hessian", "kronecker"):
        if options[name] not in (0, 1):
            raise ValueError(f"{name}={options[name]:g}: give 1 for yes or 0 for no.")
    return NewtonKrylovStepper(
        NewtonKrylov(
            problem.parameters,
            curvature=ExactHessian() if options["hessian"] else GaussNewtonFirst(),
            step=TaylorMonitor(theta=options["theta"]),
            damping=LevenbergMarquardt(initial=options["damping"]),
            preconditioning=Kronecker() if options["kronecker"] else NoPreconditioning(),
        )
    )
