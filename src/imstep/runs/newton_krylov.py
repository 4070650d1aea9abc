"""NewtonKrylov as one of the optimizers that can be named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from imstep.globalization import LevenbergMarquardt, TaylorMonitor
from imstep.optim import (
    ExactHessian,
    ExponentialAverage,
    FixedProducts,
    NewtonKrylov,
    NoPreconditioning,
)
from imstep.runs.passing import shared, shared_options, whole
from imstep.runs.steppers import AveragedStepper, Stepper, StepwiseStepper
from imstep.tasks import Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["OPTIONS", "make_for_batches", "make_newton_krylov"]

OPTIONS: Mapping[str, float] = {
    "theta": TaylorMonitor().theta,
    "damping": LevenbergMarquardt().initial,
    "hessian": 0.0,
    "kronecker": 1.0,
    "structural": 0.0,
    **shared_options(NewtonKrylov),
}
"""theta and damping are numbers; hessian=1 asks for the exact Hessian, kronecker=0 for no preconditioner;
structural is the weight of `StructuralDamping` of the hidden states that a task names."""


def make_for_batches(
    problem: Problem, options: Mapping[str, float], process_group: ProcessGroup | None = None
) -> Stepper:
    """The configuration for mini-batches, evaluated at the average of the iterates.

    Args:
        problem: whose parameters are trained.
        options: ``decay``, the weight of the past in the average, ``products`` of a step, ``weight_decay`` and
            ``structural``.
        process_group: whose processes share out each batch; None for one process.

    Raises:
        ValueError: a number is out of range.
    """
    structural = _structural(problem, options, process_group)
    average, decay = ExponentialAverage(options["decay"]), options["weight_decay"]
    optimizer = NewtonKrylov.for_batches(
        problem.parameters,
        forcing=FixedProducts(whole(options, "products")),
        average=average,
        weight_decay=decay,
        process_group=process_group,
    )
    return AveragedStepper(optimizer, process_group, structural)


def make_newton_krylov(
    problem: Problem, options: Mapping[str, float], process_group: ProcessGroup | None = None
) -> Stepper:
    """The optimizer with its strategies chosen by numbers.

    Args:
        problem: whose parameters are trained.
        options: has every key of `OPTIONS`.
        process_group: as above.

    Raises:
        ValueError: a number is out of range.
    """
    for name in ("hessian", "kronecker"):
        if options[name] not in (0, 1):
            raise ValueError(f"{name}={options[name]:g}: give 1 for yes or 0 for no.")
    structural = _structural(problem, options, process_group)
    optimizer = NewtonKrylov(
        problem.parameters,
        curvature=ExactHessian() if options["hessian"] else None,  # None for the default
        step=TaylorMonitor(theta=options["theta"]),
        damping=LevenbergMarquardt(initial=options["damping"]),
        preconditioning=None if options["kronecker"] else NoPreconditioning(),
        process_group=process_group,
        **shared(NewtonKrylov, options),
    )
    return StepwiseStepper(optimizer, process_group, structural)


def _structural(problem: Problem, options: Mapping[str, float], process_group: ProcessGroup | None) -> float:
    """The weight of structural damping, checked."""
    structural = options["structural"]
    if not 0 <= structural < math.inf:
        raise ValueError(f"structural={structural:g}: give a weight of at least 0.")
    if structural > 0 and not problem.states:
        raise ValueError(f"structural={structural:g} damps hidden states, and {problem.task} names none: leave it out.")
    if structural > 0 and process_group is not None:
        raise ValueError(f"structural={structural:g} damps hidden states in one process: leave it out, or torchrun.")
    return structural
