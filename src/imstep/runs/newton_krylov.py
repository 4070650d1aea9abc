"""NewtonKrylov as one of the optimizers that can be named."""

from __future__ import annotations

from collections.abc import Mapping

from imstep.globalization import LevenbergMarquardt, TaylorMonitor
from imstep.optim import (
    ExactHessian,
    ExponentialAverage,
    GaussNewtonFirst,
    Kronecker,
    NewtonKrylov,
    NoPreconditioning,
)
from imstep.runs.passing import shared, shared_options
from imstep.runs.steppers import AveragedStepper, Stepper, StepwiseStepper
from imstep.tasks import Problem

__all__ = ["OPTIONS", "make_for_batches", "make_newton_krylov"]

OPTIONS: Mapping[str, float] = {
    "theta": TaylorMonitor().theta,
    "damping": LevenbergMarquardt().initial,
    "hessian": 0.0,
    "kronecker": 1.0,
    **shared_options(NewtonKrylov),
}
"""theta and damping are numbers; hessian=1 asks for the exact Hessian, kronecker=0 for no preconditioner."""


def make_for_batches(problem: Problem, options: Mapping[str, float]) -> Stepper:
    """The configuration for mini-batches, evaluated at the average of the iterates.

    Args:
        problem: whose parameters are trained.
        options: ``decay``, the weight of the past in the average, and ``weight_decay``.

    Raises:
        ValueError: a number is out of range.
    """
    average, decay = ExponentialAverage(options["decay"]), options["weight_decay"]
    return AveragedStepper(NewtonKrylov.for_batches(problem.parameters, average=average, weight_decay=decay))


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
    return StepwiseStepper(
        NewtonKrylov(
            problem.parameters,
            curvature=ExactHessian() if options["hessian"] else GaussNewtonFirst(),
            step=TaylorMonitor(theta=options["theta"]),
            damping=LevenbergMarquardt(initial=options["damping"]),
            preconditioning=Kronecker() if options["kronecker"] else NoPreconditioning(),
            **shared(NewtonKrylov, options),
        )
    )
