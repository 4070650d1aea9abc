"""Linearise once, replay many times.

In infinitesimal arithmetic the real parts do not depend on the direction. A tape keeps, for every operator of one
evaluation, the linear map from imaginary inputs to imaginary outputs; applying it to a further direction runs
only these maps. Memory is addressed by slots, one per storage, and windows onto them, as in :mod:`imstep.complexstep.tensor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.tensor import Window

Reference = tuple[int, Window | None]


@dataclass(frozen=True)
class _Slot:
    window: Window
    entries: int
    zero: bool = False


@dataclass(frozen=True)
class _Step:
    """One linear map: ``push`` applied to ``inputs`` gives ``outputs``; without ``push`` a write into ``target``."""

    push: Any
    inputs: Any
    outputs: Any
    target: Reference | None = None


class TapeChangedError(RuntimeError):
    """A tensor that the tape holds was overwritten after it was recorded."""


class Tape:
    """The linear maps of one evaluation, in order."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        self._steps: list[_Step] = []
        self._inputs: list[int] = []
        self._outputs: list[Reference | None] = []
        self._last_use: dict[int, list[int]] = {}
        self._held: list[tuple[Tensor, int]] = []

    # --- recording ----------------------------------------------------------------------------------------------

    def input(self, t: Tensor) -> int:
        """A slot for an input direction laid out like ``t``."""
        slot = self.define(t)
        self._inputs.append(slot)
        return slot

    def define(self, t: Tensor, zero: bool = False) -> int:
        """A slot for the imaginary part of the fresh tensor ``t``."""
        entries = t.untyped_storage().nbytes() // t.element_size()
        self._slots.append(_Slot(Window(t), entries, zero))
        return len(self._slots) - 1

    def define_zero(self, t: Tensor) -> int:
        """A slot that starts as zeros, to be written to."""
        return self.define(t, zero=True)

    @staticmethod
    def window(t: Tensor, base: Tensor) -> Window | None:
        """How ``t`` looks onto ``base``; None where it shows the whole of it."""
        window = Window(t)
        return None if window.fits(base) else window

    def record(self, push: Any, inputs: Any, outputs: Any) -> None:
        """Append a linear map; remembers the tensors it holds, to notice when they are overwritten."""
        self._steps.append(_Step(push, inputs, outputs))
        self._held.extend((t, t._version) for t in _captured(push) if not t.is_inference())

    def record_write(self, source: Reference | None, target: Reference) -> None:
        """Append the overwriting of ``target`` by ``source`` (zeros if None)."""
        self._steps.append(_Step(None, [source], None, target))

    def finish(self, outputs: Sequence[Reference | None]) -> None:
        """Name the outputs; drops what they do not depend on and finds where each slot is used last."""
        self._outputs = list(outputs)
        needed = {ref[0] for ref in outputs if ref is not None}
        kept: list[_Step] = []
        for step in reversed(self._steps):
            produced = [step.target[0]] if step.target else list(_slots(step.outputs))
            if any(slot in needed for slot in produced):
                kept.append(step)
                needed.update(ref[0] for ref in _references(step.inputs))
        self._steps = kept[::-1]
        self._schedule()
        held = {id(t) for step in self._steps if step.push for t in _captured(step.push)}
        self._held = [(t, version) for t, version in self._held if id(t) in held]

    def _schedule(self) -> None:
        keep = {ref[0] for ref in self._outputs if ref is not None}
        seen: set[int] = set(keep)
        self._last_use = {}
        for at in range(len(self._steps) - 1, -1, -1):
            step = self._steps[at]
            used = {ref[0] for ref in _references(step.inputs)} | set(_slots(step.outputs))
            if step.target:
                used.add(step.target[0])
            self._last_use[at] = [slot for slot in used if slot not in seen]
            seen |= used

    # --- what it holds ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tape keeps alive, parameters included; each storage counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t, _ in self._held}
        return sum(storages.values())

    def check(self) -> None:
        """Raise :class:`TapeChangedError` if a tensor that the tape holds was overwritten since."""
        for t, version in self._held:
            if t._version != version:
                raise TapeChangedError(
                    f"a tensor of shape {tuple(t.shape)} was changed in place after its use was recorded; "
                    "the recorded derivative no longer belongs to it. Evaluate at the new point."
                )

    # --- replay -------------------------------------------------------------------------------------------------

    def replay(self, directions: Sequence[Tensor]) -> list[Tensor | None]:
        """Apply the recorded maps to ``directions``, one per input, each of the shape of that input."""
        values: dict[int, Tensor] = dict(zip(self._inputs, directions, strict=True))
        written = {step.target[0] for step in self._steps if step.target}
        for slot in written & values.keys():
            values[slot] = values[slot].clone()
        for at, step in enumerate(self._steps):
            if step.target is not None:
                self._write(values, step)
            else:
                ims = [self._read(values, ref) for ref in step.inputs]
                self._assign(values, step.outputs, step.push(*ims), written)
            for slot in self._last_use[at]:
                values.pop(slot, None)
        return [self._read(values, ref) for ref in self._outputs]

    def _read(self, values: dict[int, Tensor], ref: Any) -> Any:
        if ref is None:
            return None
        if isinstance(ref, list):
            return [self._read(values, r) for r in ref]
        slot, window = ref
        value = values[slot]
        if window is None:
            return value
        meta = self._slots[slot].window
        if value.shape != meta.size or value.stride() != meta.stride or value.dtype is not meta.dtype:
            value = values[slot] = self._restride(value, slot)
            if value.dim() == 1 and len(meta.size) != 1:
                return window.onto(value)
        return window.onto(value, value.storage_offset() - meta.offset)

    def _restride(self, value: Tensor, slot: int) -> Tensor:
        meta = self._slots[slot]
        full = torch.zeros(meta.entries, dtype=meta.window.dtype, device=value.device)
        shown = meta.window.onto(full)
        shown.copy_(value)
        return shown

    def _assign(self, values: dict[int, Tensor], slots: Any, ims: Any, written: set[int]) -> None:
        if isinstance(slots, list):
            for slot, im in zip(slots, ims, strict=True):
                self._assign(values, slot, im, written)
        elif slots is not None:
            meta = self._slots[slots].window
            if ims.shape != meta.size:
                ims = ims.expand(meta.size)
            values[slots] = self._restride(ims, slots) if slots in written else ims.to(meta.dtype)

    def _write(self, values: dict[int, Tensor], step: _Step) -> None:
        assert step.target is not None
        source = self._read(values, step.inputs[0])
        slot, window = step.target
        if slot not in values:
            zero = torch.zeros((), dtype=self._slots[slot].window.dtype, device=self._slots_device(values))
            values[slot] = self._restride(zero, slot)
        target = self._read(values, (slot, window if window is not None else self._slots[slot].window))
        if source is None:
            target.zero_()
        else:
            target.copy_(source)

    def _slots_device(self, values: dict[int, Tensor]) -> torch.device:
        return next(iter(values.values())).device


def _references(refs: Any) -> Iterator[Reference]:
    for ref in refs:
        if isinstance(ref, list):
            yield from _references(ref)
        elif ref is not None:
            yield ref


def _slots(slots: Any) -> Iterator[int]:
    if isinstance(slots, list):
        for slot in slots:
            yield from _slots(slot)
    elif slots is not None:
        yield slots


def _captured(function: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors that a function holds in its closure, through nested functions and tuples."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # a cell not filled yet
            continue
        for item in held if isinstance(held, (list, tuple)) else (held,):
            if isinstance(item, Tensor):
                yield item
            elif depth and callable(item):
                yield from _captured(item, depth - 1)
