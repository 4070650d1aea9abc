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
        for item in held if isinstance(held, (list, tuple)) else (held,):
            if depth and callable(item) and not isinstance(item, Tensor):
                yield from _cells(item, depth - 1)


def captured(function: Any) -> Iterator[Tensor]:
    """The tensors that a function holds in its closure, through nested functions and sequences."""
    for cell in _cells(function):
        held = cell.cell_contents
        for item in held if isinstance(held, (list, tuple)) else (held,):
            if isinstance(item, Tensor):
                yield item


def exchange(function: Any, other: Callable[[Tensor], Tensor]) -> None:
    """Let a function hold ``other(t)`` instead of ``t`` for each tensor in its closure."""
    replaced = lambda item: other(item) if isinstance(item, Tensor) else item
    for cell in _cells(function):
        held = cell.cell_contents
        if isinstance(held, Tensor):
            cell.cell_contents = other(held)
        elif type(held) in (list, tuple) and any(isinstance(item, Tensor) for item in held):
            cell.cell_contents = type(held)(replaced(item) for item in held)
