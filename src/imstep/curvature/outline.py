"""What a recording foresees of an evaluation: the operators of an earlier one, without their tensors.

Where an operator is as it was, with the same slots and windows, and constants of the same form, what was found out
about it is taken over, and only the constants are new. From the first that differs on all is found out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.operations import Operation, Reference, dead_after
from imstep.complexstep.program import literals
from imstep.complexstep.registry import signature
from imstep.complexstep.tensor import PLAIN, Window

Place = tuple[int | str, int | None]
"""Which argument of an operator, and which entry of it where it is a list."""

_SOME_TENSOR = torch.empty(0)


class Noted:
    """An operator of an earlier evaluation.

    Args:
        step: as it was noted; constants are not kept.
        windows: of each slot.
        form: of the operator and its arguments, as the recording has it.
        keeps: tells how a constant of it is kept in mind.
        smooth: whether it is, with these arguments.
    """

    __slots__ = (
        *("_arguments", "_constants", "_count", "_literals", "_outputs"),
        *("form", "func", "keeps", "smooth", "step"),
    )

    def __init__(
        self, step: Operation, windows: Sequence[Window], form: Any, keeps: Callable[[Tensor], Any], smooth: bool
    ) -> None:
        self.func, self.form, self.smooth = step.func, form, smooth
        self.keeps: list[Any] = []
        self._count, shown = len(step.args), literals(_shown(step.args), _shown_by_name(step.kwargs))
        self._literals = shown if any(a is not Tensor for a in shown) else None  # tensors are compared by themselves
        self._arguments: list[tuple[int | Place, int, Window]] = []
        self._constants: list[tuple[Place, Any]] = []
        emptied = []
        for place, a in _tensors_of(step):
            if type(a) is Reference:
                at, inner = place
                flat = type(at) is int and inner is None
                self._arguments.append((at if flat else place, a.slot, a.window or windows[a.slot]))  # type: ignore[arg-type]
            else:
                self._constants.append((place, (a.shape, layout_of(a), a.dtype)))
                self.keeps.append(keeps(a))
                emptied.append((place, None))
        self.step = step.holding(emptied)
        self._outputs = [None if slot is None else windows[slot] for slot in step.outputs]

    def constants(self, args: Any, kwargs: Any, found: Sequence[Any], key: str) -> Any:
        """The constants among the arguments, each with its place; None where this is not the operator.

        Args:
            found: its outputs.
            key: of slots, beside storages.
        """
        if len(args) != self._count or len(kwargs) != len(self.step.kwargs):
            return None
        for place, slot, window in self._arguments:
            t = args[place] if isinstance(place, int) else _at(args, kwargs, *place)
            if type(t) not in PLAIN or t.layout is not torch.strided:
                return None
            if t.untyped_storage().__dict__.get(key) != slot or not window.fits(t):
                return None
        held = []
        for place, (shape, layout, dtype) in self._constants:
            t = _at(args, kwargs, *place)
            if not _is_unmarked(t, key) or t.dtype is not dtype or t.shape != shape:
                return None
            if layout_of(t) != layout or t.is_inference():
                return None
            held.append((place, t))
        if self._literals and literals(args, kwargs) != self._literals:
            return None
        return held if self._makes(found, key) else None

    def _makes(self, found: Sequence[Any], key: str) -> bool:
        """Whether these are its outputs: fresh tensors of the same form, where it does not write to an argument."""
        if not self._outputs:
            return True
        if len(found) != len(self._outputs):
            return False
        for t, window in zip(found, self._outputs, strict=True):
            if window is None or t is None:
                if window is not t:
                    return False
            elif not _is_unmarked(t, key) or not window.fits(t):
                return False
        return True


class Outline:
    """The operators of an evaluation, in order.

    Args:
        parameters: what has other values in another one.
        windows: of each slot, those of the parameters first.
        noted: the operators.
    """

    def __init__(self, parameters: Sequence[Tensor], windows: Sequence[Window], noted: Sequence[Noted]) -> None:
        self._parameters, self.windows, self.noted = [Window(p) for p in parameters], list(windows), list(noted)
        self._arrangements: dict[int, tuple[list[int], list[list[int]]]] = {}

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it is of such parameters."""
        same = len(parameters) == len(self._parameters)
        return same and all(w.fits(p) for w, p in zip(self._parameters, parameters, strict=True))

    def arrangement(self, steps: Sequence[Operation], end: int) -> tuple[list[int], list[list[int]]]:
        """What :func:`arranged` finds of its operators."""
        found = self._arrangements.get(end)
        if found is None:
            found = self._arrangements[end] = arranged(steps, end, len(self._parameters))
        return found


def arranged(steps: Sequence[Operation], end: int, parameters: int) -> tuple[list[int], list[list[int]]]:
    """Which steps a slot takes, and which slots are needed no more after each of these."""
    needed, kept = {end}, []
    for at in reversed(range(len(steps))):
        if not needed.isdisjoint(steps[at].writes):
            kept.append(at)
            needed |= steps[at].reads
    kept.reverse()
    return kept, dead_after([steps[at] for at in kept], {end, *range(parameters)})


def _tensors_of(step: Operation) -> list[tuple[Place, Any]]:
    """References and constants among the arguments, in the order of the schema."""
    found: list[tuple[Place, Any]] = []
    for at, name, *_ in signature(step.func).tensors:
        key: int | str = at if 0 <= at < len(step.args) else name
        a = step.args[at] if key is at else step.kwargs.get(name)
        entries = enumerate(a) if isinstance(a, (list, tuple)) else [(None, a)]
        found += [((key, inner), t) for inner, t in entries if isinstance(t, (Tensor, Reference))]
    return found


def layout_of(t: Tensor) -> Any:
    """How ``t`` lies in memory: its strides, or its layout where it has none."""
    return t.stride() if t.layout is torch.strided else t.layout


def _is_unmarked(t: Any, key: str) -> bool:
    """Whether something is a plain tensor, in memory that is no slot."""
    return type(t) in PLAIN and t.layout is torch.strided and key not in t.untyped_storage().__dict__


def _at(args: Any, kwargs: Any, at: int | str, inner: int | None) -> Any:
    """What stands at a place; None where nothing does."""
    a = args[at] if type(at) is int else kwargs.get(at)
    if inner is None:
        return a
    return a[inner] if isinstance(a, (list, tuple)) and inner < len(a) else None


def _shown(a: Any) -> Any:
    """Arguments with a tensor in place of each reference."""
    if type(a) is Reference:
        return _SOME_TENSOR
    return [_shown(b) for b in a] if isinstance(a, (list, tuple)) else a


def _shown_by_name(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _shown(a) for name, a in kwargs.items()}
