"""Algebra in the dtype of its vectors, also where a caller has autocast on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def coarsest_eps(tensors: Iterable[Tensor]) -> float:
    """The rounding of what is computed from all of them, as of a loss in float64 of parameters in float32."""
    return max(torch.finfo(dtype).eps for dtype in {t.dtype for t in tensors})


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """The function without autocast: its products would be rounded to half precision."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return wrapper
