"""Who takes part, and the three values of its main setting that each method tries."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from imstep import LeastSquares, NewtonKrylov, methods
from imstep.globalization import ContractionDamping, LevenbergMarquardt, NoDamping, StrongWolfe
from imstep.optim import Direct, FixedProducts, RandomSubspace, ResidualForcing
from imstep.runs.known_methods import needed
from imstep.runs.optimizers import METHODS, get_optimizer
from imstep.runs.passing import OptimizerError
from imstep.runs.steppers import Stepper, StepwiseStepper
from imstep.tasks import Problem

FIRST_ORDER = ("adam", "sgd", "lbfgs")
"""Of PyTorch, for comparison."""

OWN: dict[str, Callable[..., Any]] = {
    "newton-krylov": NewtonKrylov,
    "newton-krylov-batches": NewtonKrylov.for_batches,
    "least-squares": LeastSquares,
}
"""The optimizers of this project with their defaults, for comparison."""

CONTESTANTS = (*(name for name in METHODS if name != "absolute-newton"), *FIRST_ORDER, *OWN)
"""All methods by name, but one that is another, `newton`."""

RATES = (0.1, 1.0, 10.0)
FIRST_ORDER_RATES = {"adam": (1e-3, 3e-3, 1e-2), "sgd": (0.01, 0.1, 1.0), "lbfgs": (0.1, 0.5, 1.0)}
ACCURACIES = (0.5, 0.1, 0.01)
SLOPES = (0.9, 0.5, 0.1)
DAMPINGS = (1e-2, 1.0, 1e2)

Make = Callable[[Problem], Stepper]


@cache
def settings(name: str) -> dict[str, Make]:
    """The settings of a contestant, by what the table calls them."""
    if name in FIRST_ORDER:
        spec = get_optimizer(name)
        return {f"lr {lr:g}": partial(_first_order, name, lr) for lr in FIRST_ORDER_RATES[spec.name]}
    method = OWN.get(name) or getattr(methods, name.removeprefix("imstep-").replace("-", "_"))
    return {label: partial(_made, method, options) for label, options in _options(method).items()}


def _first_order(name: str, lr: float, problem: Problem) -> Stepper:
    return get_optimizer(name).create(problem, lr=lr)


def _made(method: Callable[..., Any], options: dict[str, Any], problem: Problem) -> Stepper:
    try:
        return StepwiseStepper(method(problem.parameters, **needed(method, problem), **options))
    except ValueError as error:
        raise OptimizerError(str(error)) from error


def _options(method: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """Its rate where it has one; else the first damping, or how far it solves or searches."""
    signature = inspect.signature(method).parameters
    if "lr" in signature and method not in OWN.values():
        rates = [factor * signature["lr"].default for factor in RATES]
        return {f"lr {rate:g}": {"lr": rate} for rate in rates}
    told = {"full": torch.zeros} if "full" in signature else {}
    parts = method([torch.nn.Parameter(torch.zeros(3))], **told)._chosen()
    damping = parts.get("damping")
    if isinstance(damping, LevenbergMarquardt):
        values = [factor * damping.initial for factor in DAMPINGS]
        return {f"λ {value:g}": {"damping": _from(damping, value)} for value in values}
    if isinstance(damping, ContractionDamping):
        values = [factor * damping.initial for factor in DAMPINGS]
        return {f"λ {value:g}": {"damping": replace(damping, initial=value)} for value in values}
    if isinstance(parts.get("solver"), Direct) and isinstance(damping, NoDamping):
        return {"λ 0": {}, **{f"λ {x:g}": {"damping": LevenbergMarquardt(initial=x)} for x in (1e-3, 1e-1)}}
    if isinstance(parts.get("step"), StrongWolfe):
        return {f"c2 {c2:g}": {"step": StrongWolfe(c2=c2)} for c2 in SLOPES}
    if isinstance(parts.get("solver"), RandomSubspace):
        return {f"dimension {d}": {"dimension": d} for d in (8, 32, 128)}
    forcing = parts.get("forcing")
    if isinstance(forcing, ResidualForcing):
        return {f"η {eta:g}": {"forcing": replace(forcing, eta=eta)} for eta in ACCURACIES}
    if isinstance(forcing, FixedProducts):
        counts = max(forcing.count // 5, 1), forcing.count, 3 * forcing.count
        return {f"{count} products": {"forcing": FixedProducts(count)} for count in counts}
    return {"as it is": {}}


def _from(damping: LevenbergMarquardt, initial: float) -> LevenbergMarquardt:
    """The rule with another λ to begin with; one that keeps λ keeps the other one, and none begins below its floor."""
    constant = damping.floor == damping.ceiling
    floor = initial if constant else min(damping.floor, initial)
    return replace(damping, initial=initial, floor=floor, ceiling=initial if constant else damping.ceiling)
