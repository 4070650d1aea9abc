"""Which optimizers suit a task, and which refuse it: told before a run or a comparison begins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from imstep.complexstep import UnsupportedOperatorError
from imstep.curvature import NoResidualsError
from imstep.runs.optimizers import OptimizerError, OptimizerSpec
from imstep.runs.steppers import GradientStepper, RefusedError, StepwiseStepper
from imstep.tasks import Problem, Task

__all__ = ["rehearse", "suited"]

REFUSALS = (NoResidualsError, OptimizerError, UnsupportedOperatorError)


def suited(task: Task) -> tuple[str, ...]:
    """Optimizers that suit a task, the best guess first.

    Least squares leads where the loss is that of equations at points; with many examples its matrix is large.
    """
    first_order = ("adam", "sgd")
    if task.squares is False:
        return ("newton-krylov", *first_order, "lbfgs")
    if task.has_batches:
        return ("newton-krylov", *(("least-squares",) if task.squares else ()), *first_order, "lbfgs")
    return ("least-squares", "newton-krylov", "lbfgs", "adam")


def rehearse(
    spec: OptimizerSpec, problem: Problem, batch_size: int | None, options: Mapping[str, float] | None = None
) -> None:
    """Make an optimizer's first step, and take it back: what it refuses, it refuses now.

    Args:
        spec: the optimizer; torch's L-BFGS, of which a step is many, refuses nothing and is not tried.
        problem: left as it was.
        batch_size: of the run.
        options: of the optimizer.

    Raises:
        NoResidualsError, OptimizerError, UnsupportedOperatorError: the optimizer cannot train the problem.
        TaskError: nothing can, as its network or loss fails.
    """
    stepper = spec.create(problem, **dict(options or {}))
    if not isinstance(stepper, GradientStepper | StepwiseStepper):
        return
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    devices = [problem.device] if problem.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stepper.step(problem, next(problem.batches(0, batch_size)))
    except (NoResidualsError, RefusedError) as error:
        raise type(error)(f"{spec.name} does not suit {problem.task}: {error}") from error
    except Exception as error:
        if not isinstance(error, REFUSALS):
            problem.evaluate(problem.train)  # where the problem itself is at fault, that says so, with its line
        raise
    finally:
        problem.model.load_state_dict(before)
        problem.model.zero_grad(set_to_none=True)
