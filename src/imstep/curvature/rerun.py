"""An evaluation run again at other parameters as a flat list of operators: without the user's code, graph or modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from imstep.complexstep.tensor import Window


class UnlikeError(RuntimeError):
    """What ran again came to another form than the first time."""


class Reference:
    """A slot, seen through a window; None where that is its first."""

    __slots__ = ("slot", "window")

    def __init__(self, slot: int, window: Window | None) -> None:
        self.slot, self.window = slot, window


class Operation:
    """One operator: where its arguments are, and the slots and windows of its outputs; None where one is no tensor."""

    __slots__ = ("args", "func", "kwargs", "nested", "outputs", "places", "reads", "writes")

    def __init__(self, func: OpOverload, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.places = [(at, ref) for at, ref in enumerate(args) if type(ref) is Reference]
        self.nested = any(_holds(a) for a in args if type(a) in (list, tuple)) or _holds(list(kwargs.values()))
        self.outputs: list[int | None] = []
        self.reads = {ref.slot for ref in _references([*args, *kwargs.values()])}
        self.writes: set[int] = set()


class Rerun:
    """A list of operators.

    Args:
        parameters: the tensors that it reads, whose values change.
        windows: of each slot.
        steps: in order.
        constants: tensors that it holds, with their versions.
        end: what it computes.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        windows: Sequence[Window],
        steps: Sequence[Operation],
        constants: Sequence[tuple[Tensor, int]],
        end: Reference,
    ) -> None:
        self._parameters, self._windows, self._steps = parameters, windows, steps
        self._constants, self._end = constants, end
        later, self._dead = {end.slot}, []
        for step in reversed(steps):
            dead = (step.reads | step.writes) - later
            later |= dead
            self._dead.append([slot for slot in dead if slot >= len(parameters)])
        self._dead.reverse()

    def __len__(self) -> int:
        return len(self._steps)

    def __call__(self) -> Tensor:
        """The output at the parameters' present values.

        Raises:
            UnlikeError: a tensor was overwritten since, or came out in another form.
        """
        if any(t._version != version for t, version in self._constants):
            raise UnlikeError("a constant was overwritten.")
        values: dict[int, Tensor] = dict(enumerate(self._parameters))
        with torch._C._AutoDispatchBelowAutograd(), torch._C.DisableTorchFunction():
            for step, dead in zip(self._steps, self._dead, strict=True):
                self._carry_out(step, values)
                for slot in dead:
                    values.pop(slot, None)
            return _read(values, self._end)

    def _carry_out(self, step: Operation, values: dict[int, Tensor]) -> None:
        if step.nested:
            kwargs = {k: _filled(values, a) for k, a in step.kwargs.items()}
            result = step.func(*[_filled(values, a) for a in step.args], **kwargs)
        else:
            args = step.args.copy()
            for at, ref in step.places:
                args[at] = values[ref.slot] if ref.window is None else _read(values, ref)
            result = step.func(*args, **step.kwargs)
        if not step.outputs:
            return
        for slot, t in zip(step.outputs, result if isinstance(result, (list, tuple)) else (result,), strict=True):
            if slot is None:
                continue
            first = self._windows[slot]
            if t.shape != first.size or t.stride() != first.stride or t.dtype is not first.dtype:
                raise UnlikeError(f"{step.func} gave another form.")
            values[slot] = t


def _read(values: dict[int, Tensor], ref: Reference) -> Tensor:
    value = values[ref.slot]
    return value if ref.window is None else ref.window.onto(value)


def _filled(values: dict[int, Tensor], a: Any) -> Any:
    if type(a) is Reference:
        return _read(values, a)
    return [_filled(values, b) for b in a] if type(a) is list else a


def _holds(nested: Any) -> bool:
    return any(type(a) is Reference or (type(a) is list and _holds(a)) for a in nested)


def _references(nested: Any) -> list[Reference]:
    found: list[Reference] = []
    for a in nested:
        found += [a] if type(a) is Reference else _references(a) if type(a) is list else []
    return found
