"""The optimizers that imstep is measured against, by name, and how a learning rate may go.

Adam, L-BFGS and SGD are those of `imstep.runs`; Muon and SOAP come from pytorch_optimizer:
pip install -c constraints.txt '.[peers]'.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

from imstep.bench.averaging import cosine
from imstep.runs.optimizers import OPTIMIZERS, OptimizerSpec
from imstep.runs.steppers import GradientStepper, Stepper
from imstep.tasks import Problem

__all__ = ["MUON", "PACKAGE", "PEERS", "SOAP", "Schedule", "constant", "cosine", "missing"]

PACKAGE = "pytorch_optimizer"

Schedule = Callable[[float], float]
"""Factor on the learning rate as a function of how much of a run is done, 0 to 1."""


def constant(done: float) -> float:
    """1 from start to end."""
    return 1.0


def _muon(problem: Problem, options: Mapping[str, float]) -> Stepper:
    from pytorch_optimizer import Muon

    matrices = [p for p in problem.parameters if p.ndim >= 2]
    others = [p for p in problem.parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "lr": options["lr"], "use_muon": True},
        {"params": others, "lr": options["adam_lr"], "betas": (0.9, 0.999), "use_muon": False},
    ]
    return GradientStepper(Muon(groups))


def _soap(problem: Problem, options: Mapping[str, float]) -> Stepper:
    from pytorch_optimizer import SOAP

    return GradientStepper(SOAP(problem.parameters, lr=options["lr"], weight_decay=options["weight_decay"]))


MUON = OptimizerSpec(
    "muon",
    "Muon",
    "Jordan et al. 2024 on all weight matrices, Adam on the rest; one gradient a step.",
    _muon,
    {"lr": 2e-2, "adam_lr": 3e-3},
)
SOAP = OptimizerSpec(
    "soap",
    "SOAP",
    "Vyas et al. 2024 with the package's defaults (betas 0.95, bases every 10 steps) but no weight decay.",
    _soap,
    {"lr": 1e-2, "weight_decay": 0.0},
)
PEERS: dict[str, OptimizerSpec] = {
    **{name: OPTIMIZERS[name] for name in ("adam", "lbfgs", "sgd")},
    MUON.name: MUON,
    SOAP.name: SOAP,
}


def missing(spec: OptimizerSpec) -> str | None:
    """What has to be installed before the optimizer can run, or None."""
    if spec in (MUON, SOAP) and importlib.util.find_spec(PACKAGE) is None:
        return f"{spec.title} needs {PACKAGE}: pip install -c constraints.txt '.[peers]'"
    return None
