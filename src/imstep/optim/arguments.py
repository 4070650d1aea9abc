"""What callers of :func:`minimize` bring, in the form in which it is needed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imstep.linalg.conversion import known_to_torch
from imstep.optim.minimize_result import IntermediateResult
from imstep.optim.record import StepRecord
from imstep.optim.stationarity import MATRIX_LIMIT

SPREAD = 1e4
"""Ratio of the largest entry of x0 to the smallest from which, among few, their sizes are taken for their units."""


def start_of(x0: Any) -> Tensor:
    """x0 as a tensor of real numbers."""
    try:
        start = torch.as_tensor(known_to_torch(x0) if isinstance(x0, np.ndarray) else x0)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"x0 must be one tensor or what torch.as_tensor makes one of, got {type(x0).__name__}. Join several "
            "tensors by torch.cat([t.reshape(-1) for t in tensors]), and take x apart in the function by "
            "x.split(sizes); or step an optimizer, which takes any parameters: imstep.NewtonKrylov(tensors)."
        ) from error
    if not start.is_floating_point():
        pairs = "Pass torch.view_as_real(x0) and join the pairs in the function by torch.view_as_complex."
        remedy = pairs if start.is_complex() else "Convert it with .double()."
        raise TypeError(f"x0 has dtype {start.dtype}; it must be real floating point. {remedy}")
    if start.numel() == 0:
        raise ValueError(f"x0 of shape {tuple(start.shape)} has no entries: there is nothing to vary.")
    return start


def units_of(scale: Any, start: Tensor, guess: bool) -> Tensor:
    """The scale as a tensor like the start; where there is none, a ``guess`` from the sizes of few entries."""
    if scale is None and guess and 0 < start.numel() <= MATRIX_LIMIT:
        sizes = start.detach().abs()
        largest, smallest = float(sizes.max()), float(sizes.min())
        room = torch.finfo(start.dtype).max ** 0.25
        if math.inf > largest and smallest > 0 and (largest > SPREAD * smallest or not 1 / room < largest < room):
            scale = sizes
    if isinstance(scale, str):
        raise ValueError(
            f"scale is a number, or of the shape of x0, got {scale!r}. For what the columns of the Jacobian say, as by "
            'SciPy\'s x_scale="jac", leave it out with method="least-squares".'
        )
    units = torch.as_tensor(1.0 if scale is None else scale, dtype=start.dtype, device=start.device).detach()
    if units.dim() and units.shape != start.shape:
        raise ValueError(
            f"scale has shape {tuple(units.shape)}, x0 {tuple(start.shape)}. Give one number, or one for each entry."
        )
    if not bool(((units > 0) & units.isfinite()).all()):
        raise ValueError("scale must be positive and finite. Put 1 where an entry's size is not known.")
    return units


def told(
    callback: Callable[..., bool | None] | None, point: Callable[[], Tensor]
) -> Callable[[float, list[StepRecord]], bool]:
    """Whether the callback, told of a step in the way that it asks for, wants to stop."""
    if callback is None:
        return lambda loss, records: False
    by_name = list(inspect.signature(callback).parameters) == ["intermediate_result"]

    def stops(loss: float, records: list[StepRecord]) -> bool:
        x = point().detach().clone()
        try:
            if by_name:
                result = IntermediateResult(x, loss, len(records), records[-1])
                return _wants_to_stop(callback(intermediate_result=result))
            return _wants_to_stop(callback(x))
        except StopIteration:
            return True

    return stops


def _wants_to_stop(answer: Any) -> bool:
    """Whether a callback returned True, as Python, NumPy or PyTorch have it; other answers say nothing."""
    if isinstance(answer, Tensor):
        return answer.dtype == torch.bool and answer.numel() == 1 and bool(answer)
    return isinstance(answer, (bool, np.bool_)) and bool(answer)


_NOT_THERE = {"params", "box", "lr", "weight_decay"}
"""Arguments of optimizers that minimize sets itself, or that would have it minimise another function."""


def check_options(given: Iterable[str], method: str, optimizer: type) -> None:
    """Raise for options that an optimizer's constructor does not have."""
    known = inspect.signature(optimizer).parameters.keys() - _NOT_THERE
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(
            f"minimize has no option {unknown[0]!r} with method {method!r}. Derivatives are its own, and further "
            "arguments go into the function: lambda x: fun(x, a). Beside the options of its own signature it takes "
            f"those of imstep.{optimizer.__name__}."
        )


def value_of(fun: Callable[[Tensor], Tensor], by_squares: bool) -> Callable[[Tensor], Tensor]:
    """The function, which refuses a vector of residuals by name where it is to be a sum of squares."""

    def value(x: Tensor) -> Tensor:
        found = fun(x)
        if by_squares and isinstance(found, Tensor) and found.numel() > 1:
            raise ValueError(
                f"fun returned {found.numel()} numbers; least squares take the sum of their squares, in which they are "
                "found again. Return residuals.square().sum()."
            )
        return found

    return value


def check_device(device: torch.device) -> None:
    """Raise where steps cannot be taken on a device."""
    if device.type == "mps":
        raise ValueError(
            "the parameters live on mps, which has no float64, in which a step adds up norms and factors matrices. "
            "Move model and data to the CPU, or to a GPU of CUDA or ROCm."
        )
