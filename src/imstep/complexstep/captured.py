"""The tensors that a recorded linear map holds in its closure, and how to exchange them."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType, NoneType
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

_DEPTH = 3  # how far functions are followed into functions that they hold
_PLAIN = {NoneType, bool, int, float, str, OpOverload}  # most of what is held; a glance suffices


def captured(function: Any) -> list[Tensor]:
    """The tensors that a function holds in its closure, through nested functions, sequences and dictionaries."""
    found: list[Tensor] = []
    for cell in _cells(function):
        _tensors(cell.cell_contents, found)
    return found


def exchange(function: Any, other: Callable[[Tensor], Tensor]) -> None:
    """Let a function hold ``other(t)`` instead of ``t`` for each tensor in its closure."""
    for cell in _cells(function):
        cell.cell_contents = _exchanged(cell.cell_contents, other)


def _cells(function: Any, depth: int = _DEPTH) -> list[Any]:
    """The cells of the closure that may hold tensors, those of functions held in them included."""
    found = []
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # a cell not filled yet
            continue
        if type(held) in _PLAIN:
            continue
        found.append(cell)
        if depth and not isinstance(held, Tensor):
            for inner in _functions(held):
                found += _cells(inner, depth - 1)
    return found


def _functions(held: Any) -> list[Any]:
    if type(held) in (FunctionType, MethodType):
        return [held]
    return [f for item in _items(held) for f in _functions(item)]


def _tensors(held: Any, found: list[Tensor]) -> None:
    if isinstance(held, Tensor):
        found.append(held)
    else:
        for item in _items(held):
            _tensors(item, found)


def _items(held: Any) -> Any:
    """What a sequence or a dictionary holds, as arguments of operators are kept."""
    return held if isinstance(held, (tuple, list)) else held.values() if type(held) is dict else ()


def _exchanged(held: Any, other: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(held, Tensor):
        return other(held)
    if type(held) in (list, tuple):
        return type(held)(_exchanged(item, other) for item in held)
    if type(held) is dict:
        return {key: _exchanged(item, other) for key, item in held.items()}
    return held
