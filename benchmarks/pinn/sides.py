"""Who takes part in the race: LeastSquares as it is, and published rivals, each with the four settings it tries."""

from __future__ import annotations

from itertools import product

import torch

from benchmarks.pinn.phases import Kept, Then
from benchmarks.pinn.spring import Spring, SpringStepper
from benchmarks.strength.peers import PEERS, cosine
from benchmarks.strength.sides import Options, Side
from imstep import LeastSquares, methods
from imstep.optim import EqualTraces
from imstep.optim.preconditioning import SelfScaledBroyden
from imstep.runs.optimizers import OPTIMIZERS, OptimizerSpec
from imstep.runs.steppers import CheckedStepper, GradientStepper, Stepper, StepwiseStepper
from imstep.tasks import Problem

INNER = 20
"""Iterations of L-BFGS a step of its stepper."""
LARGEST = 8192
"""Parameters for which the inverse Hessian of self-scaled Broyden is kept: 0.5 GiB."""


def _least_squares(problem: Problem, options: Options) -> Stepper:
    return CheckedStepper(LeastSquares(problem.parameters))


def _balanced(problem: Problem, options: Options) -> Stepper:
    return CheckedStepper(LeastSquares(problem.parameters, balance=EqualTraces()))


def _adam(problem: Problem, options: Options) -> Stepper:
    return GradientStepper(torch.optim.Adam(problem.parameters, lr=options["lr"]))


def _adam_lbfgs(problem: Problem, options: Options) -> Stepper:
    lbfgs = lambda: OPTIMIZERS["lbfgs"].create(problem, history=100, max_iter=INNER)
    make = lambda: Kept(lbfgs, max(1, int(options["kept"]) // INNER), anew=True)
    return Then(_adam(problem, options), int(options["adam"]), make)


def _broyden(problem: Problem, options: Options) -> Stepper:
    kind = SelfScaledBroyden(limit=LARGEST)
    broyden = lambda: StepwiseStepper(methods.self_scaled_broyden(problem.parameters, preconditioning=kind))
    make = lambda: Kept(broyden, int(options["kept"]), anew=False)
    return Then(_adam(problem, options), int(options["adam"]), make)


def _newton_cg(problem: Problem, options: Options) -> Stepper:
    newton = lambda: StepwiseStepper(methods.nystrom_newton_cg(problem.parameters, rank=int(options["rank"])))
    make = lambda: Kept(newton, int(options["kept"]), anew=False)
    return Then(_adam(problem, options), int(options["adam"]), make)


def _spring(problem: Problem, options: Options) -> Stepper:
    return SpringStepper(Spring(problem.parameters, options["rate"], options["momentum"], options["damping"]))


def _grid(**values: tuple[float, ...]) -> tuple[Options, ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


_ALL = (
    Side(
        "imstep",
        "imstep",
        OptimizerSpec("imstep", "imstep", "LeastSquares with its defaults, new points in every step.", _least_squares),
        ({},),
    ),
    Side(
        "imstep-balance",
        "imstep, balanced",
        OptimizerSpec(
            "imstep-balance", "imstep, balanced", "LeastSquares which weighs the terms of the loss anew.", _balanced
        ),
        ({},),
    ),
    Side(
        "adam-lbfgs",
        "Adam, then L-BFGS",
        OptimizerSpec(
            "adam-lbfgs",
            "Adam, then L-BFGS",
            "500 steps of Adam, then torch's L-BFGS, strong Wolfe, 100 pairs, begun anew at new points every so many "
            "iterations.",
            _adam_lbfgs,
            {"adam": 500, "lr": 1e-3, "kept": 100},
        ),
        _grid(lr=(1e-3, 5e-3), kept=(100, 1000)),
    ),
    Side(
        "soap-cosine",
        "SOAP, cosine",
        PEERS["soap"],
        _grid(lr=(6e-3, 1.2e-2, 2.4e-2, 4.8e-2)),
        schedule=cosine,
    ),
    Side(
        "newton-cg",
        "NysNewton-CG",
        OptimizerSpec(
            "newton-cg",
            "NysNewton-CG",
            "500 steps of Adam at rate 1e-3, then imstep.methods.nystrom_newton_cg, new points every so many steps.",
            _newton_cg,
            {"adam": 500, "lr": 1e-3, "rank": 60, "kept": 20},
        ),
        _grid(rank=(20, 60), kept=(1, 20)),
    ),
    Side(
        "broyden",
        "self-scaled Broyden",
        OptimizerSpec(
            "broyden",
            "self-scaled Broyden",
            "500 steps of Adam, then imstep.methods.self_scaled_broyden, new points every so many steps.",
            _broyden,
            {"adam": 500, "lr": 1e-3, "kept": 500},
        ),
        _grid(lr=(1e-3, 5e-3), kept=(100, 500)),
    ),
    Side(
        "spring",
        "ENGD, SPRING's momentum",
        OptimizerSpec(
            "spring",
            "ENGD, SPRING's momentum",
            "Natural gradients with momentum at a fixed rate and damping, new points in every step.",
            _spring,
            {"rate": 0.06, "momentum": 0.968, "damping": 5e-5},
        ),
        (
            {"rate": 0.06, "momentum": 0.968, "damping": 5e-5},
            {"rate": 0.06, "momentum": 0.83, "damping": 1e-3},
            {"rate": 0.06, "momentum": 0.83, "damping": 1e-6},
            {"rate": 0.2, "momentum": 0.83, "damping": 1e-4},
        ),
    ),
)
OWN = ("imstep", "imstep-balance")
"""The sides that are no rivals."""
SIDES: dict[str, Side] = {side.name: side for side in _ALL}
