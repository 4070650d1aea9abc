"""Operators noted to be run again: where their arguments are found, and where their results go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from imstep.complexstep.tensor import Window

Values = dict[int, Tensor]
"""Tensors by the numbers of their storages, each seen through the first window onto it."""

Views = dict[int, dict[int, Tensor]]
"""Of storages that stay what they are, by number: what is seen of each through other windows, by reference."""


class UnlikeError(RuntimeError):
    """What ran again came to another form than the first time."""


class Reference:
    """A storage by its number, seen through a window; None where that is the first."""

    __slots__ = ("slot", "window")

    def __init__(self, slot: int, window: Window | None) -> None:
        self.slot, self.window = slot, window

    def read(self, values: Values, views: Views | None = None) -> Tensor:
        """The tensor; kept in ``views`` where its storage stands there."""
        value = values[self.slot]
        if self.window is None:
            return value
        known = None if views is None else views.get(self.slot)
        if known is None:
            return self.window.onto(value)
        found = known.get(id(self))
        if found is None:
            found = known[id(self)] = self.window.onto(value)
        return found


class Operation:
    """One operator: where its arguments are, and the slots of its outputs; None where one is not to be kept.

    Attributes:
        reads, writes: the storages that it looks at, and that it defines or writes to.
    """

    __slots__ = ("_nested", "_places", "args", "func", "kwargs", "outputs", "reads", "writes")

    def __init__(self, func: OpOverload, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self._places = [(at, ref) for at, ref in enumerate(args) if type(ref) is Reference]
        self._nested = any(_holds(a) for a in args if type(a) in (list, tuple)) or _holds(list(kwargs.values()))
        self.outputs: list[int | None] = []
        self.reads = {ref.slot for ref in _references([*args, *kwargs.values()])}
        self.writes: set[int] = set()

    def holding(self, constants: Iterable[tuple[tuple[int | str, int | None], Any]]) -> Operation:
        """The same with other constants, each with the argument that it is, and the entry of it if that is a list."""
        other = Operation.__new__(Operation)
        other.func, other.args, other.kwargs = self.func, self.args, self.kwargs
        other._places, other._nested, other.outputs = self._places, self._nested, self.outputs
        other.reads, other.writes = self.reads, self.writes
        for (at, inner), t in constants:
            if other.args is self.args:
                other.args, other.kwargs = self.args.copy(), self.kwargs.copy()
            within: Any = other.args if type(at) is int else other.kwargs
            if inner is None:
                within[at] = t
            else:
                within[at] = [*within[at][:inner], t, *within[at][inner + 1 :]]
        return other

    def arguments(self, values: Values, views: Views | None = None) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, read off ``values``; for ``views`` see :meth:`Reference.read`."""
        if self._nested:
            return [_filled(values, a) for a in self.args], {k: _filled(values, a) for k, a in self.kwargs.items()}
        args = self.args.copy()
        for at, ref in self._places:
            args[at] = values[ref.slot] if ref.window is None else ref.read(values, views)
        return args, self.kwargs


def dead_after(operations: list[Operation], needed: set[int]) -> list[list[int]]:
    """The storages that are needed no more after each of the operators, where ``needed`` are at the end."""
    later, dead = set(needed), []
    for operation in reversed(operations):
        last = (operation.reads | operation.writes) - later
        later |= last
        dead.append(list(last))
    return dead[::-1]


def entries(nested: Any) -> list[Any]:
    """The entries of nested sequences, in order."""
    return [b for a in nested for b in entries(a)] if isinstance(nested, (list, tuple)) else [nested]


def tensors_in(nested: Any) -> list[Tensor]:
    """The tensors in nested sequences, in order."""
    return [t for t in entries(nested) if isinstance(t, Tensor)]


def _filled(values: Values, a: Any) -> Any:
    if type(a) is Reference:
        return a.read(values)
    return [_filled(values, b) for b in a] if type(a) is list else a


def _holds(nested: Any) -> bool:
    return any(type(a) is Reference or (type(a) is list and _holds(a)) for a in nested)


def _references(nested: Iterable[Any]) -> list[Reference]:
    found: list[Reference] = []
    for a in nested:
        found += [a] if type(a) is Reference else _references(a) if type(a) is list else []
    return found
