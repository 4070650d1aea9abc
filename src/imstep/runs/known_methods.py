"""The methods of `imstep.methods` as optimizers that can be named."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from imstep import methods
from imstep.runs.passing import shared, shared_options, typed
from imstep.runs.specs import OptimizerSpec
from imstep.runs.steppers import Stepper, StepwiseStepper
from imstep.tasks import Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["known_methods", "needed"]

RATES = (0.1, 0.3, 1.0, 3.0)
"""What a sweep tries, in units of a method's own rate."""


def known_methods(taken: Collection[str] = ()) -> dict[str, OptimizerSpec]:
    """Every method, by its name with hyphens; with "imstep-" before one that is taken.

    Example:
        >>> known_methods(taken=["lbfgs"])["imstep-lbfgs"].defaults["pairs"]
        10
    """
    found = {}
    for name in methods.__all__:
        key = name.replace("_", "-")
        spec = _spec(f"imstep-{key}" if key in taken else key, getattr(methods, name))
        found[spec.name] = spec
    return found


def _spec(name: str, method: Callable[..., Any]) -> OptimizerSpec:
    """A method with the numbers that it takes itself, and the usual ones of the optimizer that it configures."""
    signature = inspect.signature(method)
    numbers = {p.name: p.default for p in signature.parameters.values() if isinstance(p.default, int | float)}
    constructor = method.__globals__[signature.return_annotation]
    # Momentum may be part of a method.
    usual = {key: value for key, value in shared_options(constructor).items() if key not in ("momentum", *numbers)}
    rate, stochastic = numbers.get("lr"), method.__module__.endswith(".stochastic")
    return OptimizerSpec(
        name,
        name,
        _first_line(method),
        partial(_make, method, constructor, tuple(numbers)),
        {**numbers, **usual},
        learning_rates=() if rate is None else tuple(float(f"{factor * rate:.2g}") for factor in RATES),
        full_batch=rate is None and not stochastic,
        mini_batches=stochastic,
        several="process_group" in inspect.signature(constructor).parameters,
    )


def _make(
    method: Callable[..., Any],
    constructor: Callable[..., Any],
    numbers: Collection[str],
    problem: Problem,
    options: Mapping[str, float],
    process_group: ProcessGroup | None = None,
) -> Stepper:
    own = typed(method, {key: options[key] for key in numbers})
    own |= needed(method, problem)
    defaults = {**shared_options(constructor), **options}
    if process_group is not None:
        own["process_group"] = process_group
    return StepwiseStepper(method(problem.parameters, **{**shared(constructor, defaults), **own}), process_group)


def needed(method: Callable[..., Any], problem: Problem) -> dict[str, Any]:
    """What a method asks for besides parameters: the loss of all data, where it has to be told."""
    return {"full": problem.closure(problem.train)} if "full" in inspect.signature(method).parameters else {}


def _first_line(method: Callable[..., Any]) -> str:
    """The first sentence of its docstring, without marks."""
    text = (inspect.getdoc(method) or "").split("\n\n")[0]
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split()))
