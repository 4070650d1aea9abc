"""Algebra in the dtype of its vectors, also where a caller has autocast on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """The function without autocast: its products would be rounded to half precision."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return wrapper
