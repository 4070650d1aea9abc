"""The tensors that a recorded linear map holds in its closure, and how to exchange them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

_DEPTH = 3  # how far functions are followed into functions that they hold


def _cells(function: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """The closure's cells, those of functions held in them included."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # a cell not filled yet
            continue
        yield cell
        for item in _items(held):
            if depth and callable(item) and not isinstance(item, Tensor):
                yield from _cells(item, depth - 1)


def _items(held: Any) -> Iterator[Any]:
    """What nested sequences and dictionaries hold in the end, as arguments of operators are kept."""
    if isinstance(held, (list, tuple)):
        for item in held:
            yield from _items(item)
    elif isinstance(held, dict):
        for item in held.values():
            yield from _items(item)
    else:
        yield held


def captured(function: Any) -> Iterator[Tensor]:
    """The tensors that a function holds in its closure, through nested functions, sequences and dictionaries."""
    for cell in _cells(function):
        for item in _items(cell.cell_contents):
            if isinstance(item, Tensor):
                yield item


def exchange(function: Any, other: Callable[[Tensor], Tensor]) -> None:
    """Let a function hold ``other(t)`` instead of ``t`` for each tensor in its closure."""
    for cell in _cells(function):
        if any(isinstance(item, Tensor) for item in _items(cell.cell_contents)):
            cell.cell_contents = _exchanged(cell.cell_contents, other)


def _exchanged(held: Any, other: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(held, Tensor):
        return other(held)
    if type(held) in (list, tuple):
        return type(held)(_exchanged(item, other) for item in held)
    if type(held) is dict:
        return {key: _exchanged(item, other) for key, item in held.items()}
    return held
