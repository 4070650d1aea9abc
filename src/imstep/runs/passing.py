"""Numbers of the command line that are handed on to a constructor as they are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["OptimizerError", "shared", "shared_options", "typed", "whole"]

_SHARED = ("lr", "weight_decay", "momentum", "max_step_norm")


class OptimizerError(ValueError):
    """No such optimizer, or it does not take such an option; the message lists what there is."""


def shared_options(constructor: Callable[..., Any]) -> dict[str, float]:
    """The options of the usual names that a constructor takes, with its defaults; infinity for none.

    >>> shared_options(lambda params, lr=0.1, momentum=0.0, max_step_norm=None, flavour=3: None)
    {'lr': 0.1, 'momentum': 0.0, 'max_step_norm': inf}
    """
    parameters = inspect.signature(constructor).parameters
    found = {name: parameters[name].default for name in _SHARED if name in parameters}
    defaults = {name: default for name, default in found.items() if default is not inspect.Parameter.empty}
    return {name: math.inf if value is None else float(value) for name, value in defaults.items()}


def shared(constructor: Callable[..., Any], options: Mapping[str, float]) -> dict[str, Any]:
    """Those of them that differ from the defaults, as the constructor takes them."""
    differing = {name: options[name] for name, value in shared_options(constructor).items() if options[name] != value}
    return typed(constructor, differing)


def typed(constructor: Callable[..., Any], options: Mapping[str, float]) -> dict[str, Any]:
    """Numbers as a constructor takes them: truth values and whole numbers are given as such.

    >>> typed(lambda params, nesterov=False, steps=3, decay=0: None, {"nesterov": 1.0, "steps": 5.0, "decay": 0.1})
    {'nesterov': True, 'steps': 5, 'decay': 0.1}

    Raises:
        OptimizerError: a truth value is neither 0 nor 1.
    """
    parameters = inspect.signature(constructor).parameters
    return {name: _like(name, parameters[name].default, value) for name, value in options.items()}


def whole(options: Mapping[str, float], name: str) -> int:
    """An option that counts.

    Raises:
        OptimizerError: it is no whole number.
    """
    value = options[name]
    if not float(value).is_integer():
        raise OptimizerError(f"{name} is a whole number, got {value:g}.")
    return int(value)


def _like(name: str, default: Any, value: float) -> Any:
    if isinstance(default, bool):
        if value not in (0, 1):
            raise OptimizerError(f"{name} is 0 or 1 here, for no or yes, got {value:g}.")
        return bool(value)
    return int(value) if isinstance(default, int) and float(value).is_integer() else value
