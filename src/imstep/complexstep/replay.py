"""Apply recorded linear maps to a direction: one pass over the steps of a tape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from imstep.complexstep.steps import Reference, Slot, Step, flat


class Replay:
    """One pass over a tape: the values of its slots."""

    def __init__(self, slots: list[Slot], overwritten: set[int]) -> None:
        self._slots, self._overwritten = slots, overwritten
        self._values: dict[int, Tensor] = {}

    def run(
        self,
        inputs: Iterable[tuple[int, Tensor]],
        steps: list[Step],
        last_use: list[list[int]],
        outputs: list[Reference | None],
    ) -> list[Tensor | None]:
        for slot, direction in inputs:
            self._assign(slot, direction)
        for step, done in zip(steps, last_use, strict=True):
            ims = [self._read(ref) for ref in step.inputs]
            if step.target is not None:
                self._write(step.target, ims[0])
            elif next(flat(ims), None) is not None:
                d_outputs = step.push(*ims)
                if self._overwritten and not self._overwritten.isdisjoint(step.reads):
                    d_outputs = _copied(d_outputs)  # it may be an alias of what will be overwritten
                self._assign(step.outputs, d_outputs)
            for slot in done:
                self._values.pop(slot, None)
        return [self._read(ref) for ref in outputs]

    def _read(self, ref: Any) -> Any:
        if ref is None:
            return None
        if isinstance(ref, list):
            return [self._read(r) for r in ref]
        slot, window = ref
        value = self._values.get(slot)
        if value is None or window is None:
            return value
        first = self._slots[slot].window
        if value.stride() != first.stride or value.dtype is not first.dtype:
            value = self._values[slot] = self._laid_out(slot, value)
        return window.onto(value, value.storage_offset() - first.offset)

    def _assign(self, slots: Any, ims: Any) -> None:
        if isinstance(slots, list):
            for slot, im in zip(slots, ims if ims is not None else [None] * len(slots), strict=True):
                self._assign(slot, im)
        elif slots is not None and ims is not None:
            first = self._slots[slots].window
            ims = ims if ims.shape == first.size else ims.expand(first.size)
            if slots in self._overwritten:
                ims = self._laid_out(slots, ims)
            self._values[slots] = ims if ims.dtype is first.dtype else ims.to(first.dtype)

    def _write(self, target: Reference, source: Tensor | None) -> None:
        slot, window = target
        if slot not in self._values:
            if source is None:
                return
            zero = source.new_zeros((), dtype=self._slots[slot].window.dtype)
            self._values[slot] = self._laid_out(slot, zero)
        shown = self._read((slot, window or self._slots[slot].window))
        if source is None:
            shown.zero_()
        else:
            shown.copy_(source)

    def _laid_out(self, slot: int, value: Tensor) -> Tensor:
        """A copy of ``value`` in memory laid out like the storage that the slot stands for."""
        meta = self._slots[slot]
        full = value.new_zeros((meta.entries,), dtype=meta.window.dtype)  # batched if value is, under vmap
        shown = meta.window.onto(full)
        shown.copy_(value)
        return shown


def _copied(ims: Any) -> Any:
    if isinstance(ims, (list, tuple)):
        return [_copied(im) for im in ims]
    return None if ims is None else ims.clone()
