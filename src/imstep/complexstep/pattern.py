"""What a tape foresees of an evaluation: the structure of earlier ones.

An evaluation that repeats itself records the same operators between the same windows onto the same slots, and only
the maps are new. While it does, what an earlier recording has found out is taken over, step by step as each is
confirmed: operator, slots and windows must be the same. From the first that differs on the rest is found out anew, so
that a wrong guess costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from imstep.complexstep.jumps import JUMPS
from imstep.complexstep.registry import signature
from imstep.complexstep.replay import Arrangement, Slot
from imstep.complexstep.steps import Reference, Step
from imstep.complexstep.tensor import Window
from imstep.complexstep.vanishing import ROOTS

if TYPE_CHECKING:
    from imstep.complexstep.program import Program

_KEPT = 4
"""Patterns kept for a set of parameters, the last ones met: of a batch, a part of it, and the last, smaller one."""

_PATIENCE = 8
"""Recordings in a row that no pattern has foreseen, after which only one in so many becomes a pattern itself."""

_IN_VAIN = 4
"""Times that a program of one pattern is looked for in a row, and none run, before it is no more: as for a loss with a
factor that is another number in each step."""

_KEYWORD = 2**31  # beyond all positions


class Foreseen:
    """A step without its map.

    Attributes:
        step: without ``push``, ``args`` and ``result``.
        maps: whether it has a map.
        tensors: position, name, slot and window of each tensor argument of its operator; slot None for a constant.
            None where the operator is not to be known by them.
    """

    __slots__ = ("maps", "step", "tensors")

    def __init__(self, step: Step, slots: Sequence[Slot]) -> None:
        self.step, self.maps = step.again(None, step.node), step.push is not None
        self.tensors = self._tensors(step, slots) if self.maps and step.target is None else None

    @staticmethod
    def _tensors(step: Step, slots: Sequence[Slot]) -> list[tuple[int, str, int | None, Window | None]] | None:
        sig, found = signature(step.func), []
        if sig.overwritten or sig.view or id(step.func) in ROOTS or id(step.func) in JUMPS or step.exchanges:
            return None
        if len(sig.tensors) != len(step.inputs):
            return None
        for (at, name, many, _), ref in zip(sig.tensors, step.inputs, strict=True):
            if many or type(ref) is list:
                return None
            slot, window = (None, None) if ref is None else ref if type(ref) is tuple else (ref, slots[ref].window)
            if window is not None and window.dtype.is_complex:
                return None
            found.append((_KEYWORD if at < 0 else at, name, slot, window))
        return found

    def same(self, step: Step, maps: bool) -> bool:
        """Whether a step, which has a map or none, is this one."""
        own = self.step
        return (
            own.func is step.func
            and own.backward == step.backward
            and self.maps == maps
            and own.outputs == step.outputs
            and _same(own.inputs, step.inputs)
            and _same(own.target, step.target)
        )


class Pattern:
    """The structure of one tape.

    Args:
        slots, inputs, steps, outputs, arrangement: as of the tape.

    Attributes:
        derived: of tapes with other inputs of some steps, by these: the inputs, and the arrangement.
        program: of the backward pass; None while it is not known.
        plain: whether none is to be looked for.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        inputs: Sequence[int],
        steps: Sequence[Step],
        outputs: Sequence[Reference | None],
        arrangement: Arrangement,
    ) -> None:
        self.slots, self.inputs, self.outputs = tuple(slots), list(inputs), list(outputs)
        self.steps = [Foreseen(step, slots) for step in steps]
        self.arrangement = arrangement
        self.derived: dict[tuple[int, ...], tuple[list[list[Any]], Arrangement]] = {}
        self.program: Program | None = None
        self.plain = False
        self._in_vain = 0  # programs in a row that were not run

    def has(self, slot: int, t: Tensor, entries: int) -> bool:
        """Whether a slot is that of ``t``, in a storage of so many entries."""
        if slot >= len(self.slots):
            return False
        known = self.slots[slot]
        return known.entries == entries and known.window.fits(t)

    def foresees(self, number: int, step: Step) -> bool:
        """Whether a step is the one of that number."""
        return number < len(self.steps) and self.steps[number].same(step, step.push is not None)

    def ran(self) -> None:
        """The program was run to its end."""
        self._in_vain = 0

    def looked_in_vain(self) -> None:
        """The program was not run, because something was not as it had been; or none could be noted."""
        self.program = None
        self._in_vain += 1
        self.plain = self._in_vain >= _IN_VAIN

    def is_of(self, slots: int, steps: int, inputs: Sequence[int], outputs: Sequence[Reference | None]) -> bool:
        """Whether a tape that has followed this so far, and has come to so many slots and steps, has followed all."""
        counts = slots == len(self.slots) and steps == len(self.steps)
        return counts and self.inputs == inputs and _same(self.outputs, list(outputs))

    def begins_like(self, other: Pattern, slots: int, steps: int) -> bool:
        """Whether another one has the same first slots and steps."""
        if min(len(self.slots), len(other.slots)) < slots or min(len(self.steps), len(other.steps)) < steps:
            return False
        pairs = zip(self.slots[:slots], other.slots[:slots], strict=True)
        if not all(a is b or (a.entries == b.entries and a.window.same(b.window)) for a, b in pairs):
            return False
        both = zip(self.steps[:steps], other.steps[:steps], strict=True)
        return all(a.same(b.step, b.maps) for a, b in both)


class Patterns:
    """The patterns of earlier recordings with the same inputs, the last one met first."""

    def __init__(self) -> None:
        self._known: tuple[Pattern, ...] = ()
        self._missed = 0

    def first(self) -> Pattern | None:
        """The one to expect."""
        return self._known[0] if self._known else None

    def others(self, pattern: Pattern, slots: int, steps: int) -> list[Pattern]:
        """Those that have the same first slots and steps."""
        return [p for p in self._known if p is not pattern and p.begins_like(pattern, slots, steps)]

    def met(self, pattern: Pattern) -> None:
        """A recording has followed one to the end."""
        self._missed = 0
        if self._known[:1] != (pattern,):
            self._known = (pattern, *(p for p in self._known if p is not pattern))[:_KEPT]

    def missed(self, *structure: Any) -> Pattern | None:
        """A recording of another structure, the arguments of :class:`Pattern`: its own pattern, if it is kept."""
        self._missed += 1
        if self._missed > _PATIENCE and self._missed % _PATIENCE:
            return None
        pattern = Pattern(*structure)
        self._known = (pattern, *self._known)[:_KEPT]
        return pattern


_PATTERNS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def patterns_of(inputs: Sequence[Tensor]) -> Patterns | None:
    """The patterns of recordings with these inputs, as long as the first of them lives."""
    if not inputs or torch._C._functorch.maybe_current_level() is not None:
        return None
    found = _PATTERNS.get(inputs[0])
    if found is None:
        found = _PATTERNS[inputs[0]] = Patterns()
    return found


def _same(some: Any, others: Any) -> bool:
    """Whether nested references are the same."""
    if type(some) is not type(others):
        return False
    if type(some) is list:
        return len(some) == len(others) and all(map(_same, some, others))
    if type(some) is tuple:
        return some[0] == others[0] and (some[1] is others[1] or some[1].same(others[1]))
    return some == others
