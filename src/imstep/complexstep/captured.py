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
    _collect(function, _DEPTH, found)
    return found


def _collect(held: Any, depth: int, found: list[Tensor]) -> None:
    kind = type(held)
    if isinstance(held, Tensor):
        found.append(held)
    elif kind is FunctionType or kind is MethodType:
        if depth >= 0:
            for cell in held.__closure__ or ():
                item = _contents(cell)
                kind = type(item)
                if kind is Tensor:
                    found.append(item)
                elif kind not in _PLAIN:
                    _collect(item, depth - 1, found)
    else:
        for item in _items(held):
            _collect(item, depth, found)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _items(held: Any) -> Any:
    """What a sequence or a dictionary holds, as arguments of operators are kept."""
    return held if isinstance(held, (tuple, list)) else held.values() if type(held) is dict else ()


def exchange(function: Any, other: Callable[[Tensor], Tensor]) -> None:
    """Let a function hold ``other(t)`` instead of ``t`` for each tensor in its closure."""
    _exchange(function, other, _DEPTH)


def _exchange(held: Any, other: Callable[[Tensor], Tensor], depth: int) -> None:
    if isinstance(held, (FunctionType, MethodType)):
        for cell in held.__closure__ or () if depth >= 0 else ():
            item = _contents(cell)
            exchanged = _exchanged(item, other)
            if exchanged is not item:
                cell.cell_contents = exchanged
            _exchange(item, other, depth - 1)
    else:
        for item in _items(held):
            _exchange(item, other, depth)


def _exchanged(held: Any, other: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(held, Tensor):
        return other(held)
    if type(held) in (list, tuple):
        return type(held)(_exchanged(item, other) for item in held)
    if type(held) is dict:
        return {key: _exchanged(item, other) for key, item in held.items()}
    return held
