"""The optimizers that can be named, and the options they take."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from imstep.globalization import ContractionDamping
from imstep.optim import EarlierDraws, EqualGradients, EqualTraces, ExponentialAverage, FixedProducts, LeastSquares
from imstep.runs.foreign import FirstOrder, first_order
from imstep.runs.known_methods import known_methods
from imstep.runs.newton_krylov import OPTIONS, make_for_batches, make_newton_krylov
from imstep.runs.passing import OptimizerError, shared, shared_options, whole
from imstep.runs.specs import OptimizerSpec
from imstep.runs.steppers import (
    LOSS_COST,
    CheckedStepper,
    GradientStepper,
    LBFGSStepper,
    Stepper,
    StepResult,
)
from imstep.tasks import Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "LOSS_COST",
    "METHODS",
    "OPTIMIZERS",
    "OptimizerError",
    "OptimizerSpec",
    "StepResult",
    "Stepper",
    "get_optimizer",
]


_AS_THE_TASK = -1.0
_BALANCES = {0.0: None, 1.0: EqualTraces(), 2.0: EqualGradients()}


def _least_squares(
    problem: Problem, options: Mapping[str, float], process_group: ProcessGroup | None = None
) -> Stepper:
    damping = ContractionDamping(initial=options["damping"])
    more = shared(LeastSquares, options)
    if options["recall"] != 0:
        more["recall"] = EarlierDraws(options["recall"])
    # Several processes cannot balance: what a task would have is left out, what is asked for is refused.
    default = 1.0 if problem.balanced and process_group is None else 0.0
    chosen = default if options["balance"] == _AS_THE_TASK else options["balance"]
    if chosen not in _BALANCES:
        raise OptimizerError(
            "balance is 0 for none, 1 for EqualTraces, 2 for EqualGradients, or -1 for what the task has, got "
            f"{options['balance']:g}."
        )
    more["balance"] = _BALANCES[chosen]
    more |= {"damping": damping, "corrections": whole(options, "corrections"), "process_group": process_group}
    return CheckedStepper(LeastSquares(problem.parameters, **more), process_group)


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
            history_size=whole(options, "history"),
            max_iter=whole(options, "max_iter"),
            # torch's defaults (1e-7, 1e-9) end steps early and stall the method before its best loss.
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        ),
        options["weight_decay"],
    )


_ALL = (
    OptimizerSpec(
        "newton-krylov",
        "NewtonKrylov",
        "Newton steps by CG on complex-step curvature, Taylor error monitored. No learning rate.",
        make_newton_krylov,
        OPTIONS,
        full_batch=True,
        several=True,
    ),
    OptimizerSpec(
        "newton-krylov-batches",
        "NK.for_batches",
        "NewtonKrylov.for_batches, short solves for mini-batches, evaluated at the average of the iterates.",
        make_for_batches,
        {
            "decay": ExponentialAverage().decay,
            "products": FixedProducts().count,
            "weight_decay": 0.0,
            "structural": 0.0,
        },
        mini_batches=True,
        several=True,
    ),
    OptimizerSpec(
        "least-squares",
        "LeastSquares",
        "Levenberg-Marquardt steps in residual space, for few residuals, as of differential equations.",
        _least_squares,
        {
            "damping": ContractionDamping().initial,
            "corrections": 4,
            "recall": 0.0,
            "balance": _AS_THE_TASK,
            **shared_options(LeastSquares),
        },
        full_batch=True,
        several=True,
    ),
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
        {"lr": 1.0, "history": 100, "max_iter": 20, "weight_decay": 0.0},
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

METHODS: dict[str, OptimizerSpec] = known_methods(taken=OPTIMIZERS)
"""Those of `imstep.methods`."""


def get_optimizer(name: str) -> OptimizerSpec:
    """The optimizer or method of that name, or a first-order one given by its class, such as `torch.optim:RMSprop`.

    Raises:
        OptimizerError: there is none; names the nearest and lists all.
    """
    every = {**OPTIMIZERS, **METHODS}
    key = name.replace("_", "-")
    if key in every:
        return every[key]
    if ":" in name:
        return _foreign(first_order(name))
    near = difflib.get_close_matches(key, every, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise OptimizerError(
        f"there is no optimizer {name!r}.{hint} Optimizers: {', '.join(OPTIMIZERS)}; methods by name: "
        f"{', '.join(METHODS)}; or a first-order one by its class, such as torch.optim:RMSprop."
    )


def _foreign(found: FirstOrder) -> OptimizerSpec:
    """A first-order optimizer that is not among those named here."""
    return OptimizerSpec(
        found.name,
        found.kind.__name__,
        f"{found.name}; one gradient a step.",
        lambda problem, options: GradientStepper(found.make(problem.parameters, options)),
        found.options,
        learning_rates=(1e-4, 1e-3, 1e-2, 1e-1) if "lr" in found.options else (),
    )
