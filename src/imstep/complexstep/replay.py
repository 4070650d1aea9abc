"""Apply recorded linear maps to directions: one pass over the steps of a tape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from imstep.complexstep.steps import Reference, Step, flat, slot_of
from imstep.complexstep.tensor import Window

_Values = dict[int, Tensor]


class Slot(NamedTuple):
    """The imaginary part of one storage: its first window onto it, and how many entries the storage has."""

    window: Window
    entries: int


class _Around(NamedTuple):
    """What to do around a step.

    Attributes:
        whole: whether its inputs are slots as they were defined.
        copied: whether a result may be an alias of what will be overwritten.
        final: the numbers of the outputs that are complete after it.
        dead: the slots that are not needed after it.
    """

    whole: bool
    copied: bool
    final: Sequence[int]
    dead: Sequence[int]


class Arrangement(NamedTuple):
    """How steps are replayed, whatever their maps.

    Attributes:
        kept: which of them outputs, or other processes, depend on.
        around: what to do around each of these.
        at_once: the outputs that no step has a part in.
        overwritten: the slots that a step writes into.
    """

    kept: list[int]
    around: list[_Around]
    at_once: list[int]
    overwritten: frozenset[int]


class Replay:
    """The steps that outputs depend on, arranged for being run again and again.

    Args:
        slots: the tape's memory.
        inputs: the slots of the inputs.
        steps: in order.
        outputs: what to compute.
        arrangement: of these steps, where it is known.
    """

    def __init__(
        self,
        slots: list[Slot],
        inputs: list[int],
        steps: list[Step],
        outputs: list[Reference | None],
        arrangement: Arrangement | None = None,
    ) -> None:
        self._slots, self._inputs, self._outputs = slots, inputs, outputs
        self.arrangement = arrangement = arrangement or arranged(steps, outputs)
        self.steps = [steps[at] for at in arrangement.kept]
        self._instructions = list(zip(self.steps, arrangement.around, strict=True))
        self._at_once, self._overwritten = arrangement.at_once, arrangement.overwritten

    def run(self, directions: Iterable[Tensor]) -> Iterator[tuple[int, Tensor | None]]:
        """The number and the imaginary part of each output as soon as it is complete; None where it vanishes."""
        values: _Values = {}
        for slot, direction in zip(self._inputs, directions, strict=True):
            self._assign(values, slot, direction)
        for number in self._at_once:
            yield number, self._read(values, self._outputs[number])
        for step, (whole, copied, final, dead) in self._instructions:
            ims = [values.get(ref) if whole else self._read(values, ref) for ref in step.inputs]
            if step.target is not None:
                self._write(values, step.target, ims[0])
            elif _any(ims) or step.exchanges:
                self._assign(values, step.outputs, _copied(step.push(*ims)) if copied else step.push(*ims))
            del ims  # what is dead is to be released
            for number in final:
                yield number, self._read(values, self._outputs[number])
            for slot in dead:
                values.pop(slot, None)

    # --- memory -------------------------------------------------------------------------------------------------

    def _read(self, values: _Values, ref: Any, negated: bool = True) -> Any:
        if type(ref) is list:
            return [self._read(values, r) for r in ref]
        if type(ref) is not tuple:
            return values.get(ref)
        slot, window = ref
        value = values.get(slot)
        if value is None:
            return None
        first = self._slots[slot].window
        if (
            value.stride() != first.stride
            or value.dtype is not first.dtype
            or value.is_conj() != first.conj
            or value.is_neg() != first.neg
        ):
            value = values[slot] = self._laid_out(slot, value)
        return window.onto(value, value.storage_offset() - first.offset, negated)

    def _assign(self, values: _Values, slots: Any, ims: Any) -> None:
        if ims is None or slots is None:
            return
        if type(slots) is list:
            for slot, im in zip(slots, ims, strict=True):
                self._assign(values, slot, im)
            return
        first = self._slots[slots].window
        if ims.shape != first.size:
            ims = ims.expand(first.size)
        if slots in self._overwritten:
            ims = self._laid_out(slots, ims)
        values[slots] = ims if ims.dtype is first.dtype else ims.to(first.dtype)

    def _write(self, values: _Values, target: Reference, source: Tensor | None) -> None:
        slot = slot_of(target)
        if slot not in values:
            if source is None:
                return
            zero = source.new_zeros((), dtype=self._slots[slot].window.dtype)
            values[slot] = self._laid_out(slot, zero)
        window = target[1] if type(target) is tuple else self._slots[slot].window
        shown = self._read(values, (slot, window), negated=False)
        if source is None:
            shown.zero_()
        else:
            shown.copy_(-source if window.neg else source)

    def _laid_out(self, slot: int, value: Tensor) -> Tensor:
        """A copy of ``value`` in memory laid out like the storage that the slot stands for."""
        meta = self._slots[slot]
        # Batched if value is, under vmap; then complex windows ask for an even distance between the directions.
        full = value.new_zeros((meta.entries + meta.entries % 2,), dtype=meta.window.dtype)
        shown = meta.window.onto(full)
        shown.copy_(value)
        return shown


def arranged(steps: Sequence[Step], outputs: Sequence[Reference | None]) -> Arrangement:
    """The arrangement of steps for outputs."""
    kept = _needed(steps, {slot_of(ref) for ref in outputs if ref is not None})
    overwritten = frozenset(slot_of(steps[at].target) for at in kept if steps[at].target is not None)  # type: ignore[arg-type]
    pending: dict[int, list[int]] = {}
    for number, ref in enumerate(outputs):
        pending.setdefault(-1 if ref is None else slot_of(ref), []).append(number)
    around: list[_Around] = []
    later: set[int] = set()
    for step in (steps[at] for at in reversed(kept)):
        reads, writes = step.reads(), step.writes()
        final = [number for slot in writes for number in pending.pop(slot, ())]
        dead = [slot for slot in {*reads, *writes} if slot not in later]
        later.update(dead)
        whole = not any(type(ref) is list or type(ref) is tuple for ref in step.inputs)
        around.append(_Around(whole, not overwritten.isdisjoint(reads), final or (), dead or ()))
    return Arrangement(kept, around[::-1], [n for numbers in pending.values() for n in numbers], overwritten)


def _needed(steps: Sequence[Step], slots: set[int]) -> list[int]:
    """Which of the steps ``slots``, or other processes, depend on."""
    kept = []
    for at in reversed(range(len(steps))):
        step = steps[at]
        if step.exchanges or not slots.isdisjoint(step.writes()):
            kept.append(at)
            slots.update(step.reads())
    return kept[::-1]


def _any(ims: list[Any]) -> bool:
    """Whether an imaginary part is there."""
    return any(im is not None and (type(im) is not list or flat(im)) for im in ims)


def _copied(ims: Any) -> Any:
    if isinstance(ims, (list, tuple)):
        return [_copied(im) for im in ims]
    return None if ims is None else ims.clone()
