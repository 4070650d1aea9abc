"""Who takes part: named configurations of imstep, and the peers, each with the settings that tuning tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.strength.peers import PEERS, Schedule, constant, cosine
from imstep.globalization import LevenbergMarquardt
from imstep.optim import ExponentialAverage, FixedProducts, NewtonKrylov, Recycling
from imstep.runs.optimizers import OPTIMIZERS, OptimizerSpec
from imstep.runs.steppers import AveragedStepper, Stepper, StepwiseStepper
from imstep.tasks import Problem

Options = Mapping[str, float]


@dataclass(frozen=True)
class Side:
    """An optimizer as it takes part.

    Args:
        name: for the command line and the record.
        title: for tables.
        spec: makes the optimizer.
        trials: the settings that tuning tries; the lowest training loss at the end of a trial wins.
        elsewhere: other trials for tasks where the scale of the settings is another.
        schedule: how the learning rate goes.
    """

    name: str
    title: str
    spec: OptimizerSpec
    trials: tuple[Options, ...]
    elsewhere: Mapping[str, tuple[Options, ...]] = field(default_factory=dict)
    schedule: Schedule = constant

    def trials_on(self, task: str) -> tuple[Options, ...]:
        """What is tried on the task of that name."""
        return self.elsewhere.get(task, self.trials)


def _newton_krylov(problem: Problem, options: Options) -> Stepper:
    return StepwiseStepper(
        NewtonKrylov(
            problem.parameters,
            damping=LevenbergMarquardt(initial=options["damping"]),
            preconditioning=Recycling(pairs=30),
        )
    )


def _for_batches(problem: Problem, options: Options) -> Stepper:
    forcing = FixedProducts(int(options["products"]))
    average = ExponentialAverage(0.9)
    return AveragedStepper(NewtonKrylov.for_batches(problem.parameters, forcing=forcing, average=average))


_IMSTEP = OptimizerSpec(
    "imstep", "imstep", "Recycling of 30 pairs, else the defaults.", _newton_krylov, {"damping": 1e-3}
)
_BATCHES = OptimizerSpec(
    "imstep-batches",
    "imstep, for batches",
    "NewtonKrylov.for_batches, evaluated at the average of the iterates.",
    _for_batches,
    {"products": 2},
)


def _rates(*values: float) -> tuple[Options, ...]:
    return tuple({"lr": value} for value in values)


_SOAP_RATES = _rates(5e-3, 1e-2, 2e-2, 4e-2)
_CONVECTION = ("convection-float32", "convection-float64", "convection-random-float32")
_SOAP_ELSEWHERE = dict.fromkeys(_CONVECTION, _rates(1.5e-3, 3e-3, 6e-3, 1.2e-2))
_ALL = (
    Side("imstep", "imstep", _IMSTEP, tuple({"damping": v} for v in (1e-4, 3e-4, 1e-3, 1e-2))),
    Side(
        "imstep-batches",
        "imstep, for batches",
        _BATCHES,
        tuple({"products": v} for v in (2, 4, 6, 8)),
    ),
    Side(
        "imstep-residual",
        "imstep, residual space",
        OPTIMIZERS["least-squares"],
        tuple({"damping": v} for v in (1e-6, 1e-5, 1e-4, 1e-3)),
    ),
    Side("adam", "Adam", PEERS["adam"], _rates(1e-3, 2e-3, 4e-3, 8e-3)),
    Side(
        "lbfgs",
        "L-BFGS",
        PEERS["lbfgs"],
        tuple({"history": v} for v in (10, 30, 100, 300)),
    ),
    Side("muon", "Muon", PEERS["muon"], _rates(5e-3, 1e-2, 2e-2, 4e-2)),
    Side(
        "sgd",
        "SGD, momentum",
        PEERS["sgd"],
        _rates(0.03, 0.1, 0.3, 1.0),
        {"autoencoder-batches": _rates(1.0, 3.0, 10.0, 30.0)},
    ),
    Side("soap", "SOAP", PEERS["soap"], _SOAP_RATES, _SOAP_ELSEWHERE),
    Side("soap-cosine", "SOAP, cosine", PEERS["soap"], _SOAP_RATES, _SOAP_ELSEWHERE, schedule=cosine),
)
SIDES: dict[str, Side] = {side.name: side for side in _ALL}
