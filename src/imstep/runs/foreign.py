"""First-order optimizers of torch and of other packages, by the name of their class."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from imstep.runs.passing import OptimizerError, typed

__all__ = ["FirstOrder", "first_order"]


@dataclass(frozen=True)
class FirstOrder:
    """A class of optimizers that take a step from gradients alone.

    Args:
        name: module and class, such as "torch.optim:RMSprop".
        kind: the class.
        options: its numbers and their defaults.
    """

    name: str
    kind: type[torch.optim.Optimizer]
    options: Mapping[str, float]

    def make(self, parameters: Iterable[Any], options: Mapping[str, float]) -> torch.optim.Optimizer:
        """An optimizer of that class.

        Raises:
            ValueError: it needs more than parameters and numbers.
        """
        try:
            return self.kind(parameters, **typed(self.kind, options))
        except TypeError as error:
            raise ValueError(str(error)) from error


def first_order(name: str) -> FirstOrder:
    """The class of that name.

    Raises:
        OptimizerError: it is not there, is no optimizer, or needs more than gradients.

    Example:
        >>> first_order("torch.optim:Adagrad").options["lr"]
        0.01
    """
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        package, remedy = module.partition(".")[0], "Write MODULE:CLASS, such as torch.optim:RMSprop."
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            remedy = f"Install it (pip install {package}) if that is its name, or name another optimizer."
        raise OptimizerError(f"{name}: {error}. {remedy}") from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise OptimizerError(f"{name} is no torch.optim.Optimizer. Write MODULE:CLASS, such as torch.optim:RMSprop.")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if kind is torch.optim.LBFGS or (closure is not None and closure.default is closure.empty):
        raise OptimizerError(f"{name} needs a closure: by its class a first-order optimizer can be named. See lbfgs.")
    parameters = inspect.signature(kind).parameters
    numbers = {p.name: p.default for p in parameters.values() if isinstance(p.default, int | float)}
    return FirstOrder(name, kind, numbers)
