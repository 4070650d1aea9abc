"""Linearise once, replay many times.

In infinitesimal arithmetic the real parts do not depend on the direction. A tape keeps, for every operator of one
evaluation, the linear map from imaginary inputs to imaginary outputs. Recording it costs one evaluation of the real
parts; applying it to a direction runs only the maps. Memory is addressed by slots, one per storage,
and windows onto them, as in :mod:`imstep.complexstep.tensor`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.captured import captured, exchange
from imstep.complexstep.replay import Replay
from imstep.complexstep.steps import Call, Reference, Slot, Step
from imstep.complexstep.tensor import Window

_aten = torch.ops.aten
LOSS_OPERATORS = {
    _aten.mul.Tensor,
    _aten.mul.Scalar,
    _aten.div.Tensor,
    _aten.div.Scalar,
    _aten.pow.Tensor_Scalar,
    _aten.mse_loss.default,
    _aten.huber_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.binary_cross_entropy.default,
    _aten.binary_cross_entropy_with_logits.default,
    _aten.softplus.default,
    _aten.exp.default,
    _aten._log_softmax.default,
}
"""Operators that may stand between a model's outputs and the loss; their arguments are kept for a second look."""


class TapeChangedError(RuntimeError):
    """A tensor that the tape holds was overwritten after it was recorded."""


class TapeTooLargeError(RuntimeError):
    """What a tape holds would take more memory than it was given."""


class Tape:
    """The linear maps of one evaluation, in order.

    Args:
        memory_budget: bytes that its maps may hold, parameters included; None for no limit.
    """

    replays_blocks = True  # maps can be applied to many directions at once, by vmap

    def __init__(self, memory_budget: int | None = None) -> None:
        self._memory_budget, self._bytes = memory_budget, 0
        self._slots: list[Slot] = []
        self._steps: list[Step] = []
        self._inputs: list[int] = []
        self._outputs: list[Reference | None] = []
        self._last_use: list[list[int]] = []
        self._overwritten: set[int] = set()
        self._held: list[tuple[Tensor, int, Any]] = []  # a tensor, its version, the map that holds it
        self._holders: dict[int, list[tuple[Tensor, int | None, Any]]] = {}  # while recording, by storage

    # --- recording ----------------------------------------------------------------------------------------------

    def input(self, t: Tensor) -> int:
        """A slot for the direction of the input ``t``."""
        self._inputs.append(self.define(t))
        return self._inputs[-1]

    def define(self, t: Tensor) -> int:
        """A slot for the imaginary part of the storage of the fresh tensor ``t``."""
        entries = t.untyped_storage().nbytes() // t.element_size()
        self._slots.append(Slot(Window(t), entries))
        return len(self._slots) - 1

    def reference(self, slot: int, t: Tensor) -> Reference:
        """How ``t`` looks onto ``slot``: no window where it shows it as it was defined."""
        return slot, None if self._slots[slot].window.fits(t) else Window(t)

    def record(self, push: Any, inputs: list[Any], outputs: Any, call: Call) -> None:
        """Append a linear map; remembers the tensors it holds, to notice when they are overwritten."""
        self._steps.append(Step(push, inputs, outputs, call))
        for t in captured(push):
            self._hold(t, push)

    def _hold(self, t: Tensor, push: Any) -> None:
        storage = t.untyped_storage() if t.layout is torch.strided else None
        place = id(t) if storage is None else storage._cdata
        if storage is not None and self._memory_budget is not None and place not in self._holders:
            self._bytes += storage.nbytes()
            if self._bytes > self._memory_budget:
                raise TapeTooLargeError(
                    f"the recorded derivative takes more than the memory budget of {self._memory_budget} bytes."
                )
        self._holders.setdefault(place, []).append((t, None if t.is_inference() else t._version, push))

    def protect(self, t: Tensor) -> None:
        """Give recorded maps that hold the memory of ``t`` a copy of it, because it is about to be overwritten."""
        if t.layout is not torch.strided:
            return
        holders = self._holders.pop(t.untyped_storage()._cdata, [])
        copies = {id(held): held.detach().clone() for held, *_ in holders}
        for _, _, push in holders:
            exchange(push, lambda held: copies.get(id(held), held))
        for held, _, push in holders:
            self._hold(copies[id(held)], push)

    def record_write(self, source: Reference | None, target: Reference, call: Call) -> None:
        """Append the overwriting of ``target`` by ``source`` (by zeros if None)."""
        self._steps.append(Step(None, [source], None, call, target))

    def finish(self, outputs: Sequence[Reference | None]) -> None:
        """Name the outputs; drops what they do not depend on and finds where each slot is used last.

        Raises:
            TapeChangedError: the evaluation overwrote a tensor that one of its maps still needs.
        """
        self._outputs = list(outputs)
        self._drop_unneeded()
        self._overwritten = {step.target[0] for step in self._steps if step.target}
        seen = {ref[0] for ref in outputs if ref is not None}
        last_use = []
        for step in reversed(self._steps):
            used = set(step.reads) | set(step.writes)
            last_use.append([slot for slot in used if slot not in seen])
            seen |= used
        self._last_use = last_use[::-1]
        self.check()

    def _drop_unneeded(self) -> None:
        needed = {ref[0] for ref in self._outputs if ref is not None}
        kept: list[Step] = []
        for step in reversed(self._steps):
            if any(slot in needed for slot in step.writes):
                kept.append(step)
                needed.update(step.reads)
        # The arguments of possible losses have served their purpose.
        forget = lambda step: replace(step, call=replace(step.call, args=(), result=None)) if step.call.args else step
        self._steps = [forget(step) for step in reversed(kept)]
        self._held += [(t, v, push) for ts in self._holders.values() for t, v, push in ts if v is not None]
        self._holders = {}
        maps = {id(step.push) for step in self._steps}
        self._held = [held for held in self._held if id(held[2]) in maps]

    def with_steps(self, steps: list[Step]) -> Tape:
        """A tape on the same memory with other steps."""
        return self._derived(steps, self._inputs, self._outputs)

    def watching(self, references: Sequence[Reference]) -> Tape:
        """A tape whose replays return the imaginary parts at ``references`` as well, after the outputs."""
        return self._derived(self._steps, self._inputs, [*self._outputs, *references])

    def restricted(self, inputs: Sequence[int], outputs: Sequence[int]) -> Tape:
        """A tape from some of the inputs to some of the outputs, by position, without steps that no path takes."""
        chosen = [self._inputs[at] for at in inputs]
        live = set(chosen)
        steps = []
        for step in self._steps:
            if not live.isdisjoint([*step.reads, *([step.target[0]] if step.target else [])]):
                steps.append(step)
                live.update(step.writes)
        return self._derived(steps, chosen, [self._outputs[at] for at in outputs])

    def _derived(self, steps: list[Step], inputs: list[int], outputs: Sequence[Reference | None]) -> Tape:
        other = Tape()
        other._slots, other._held, other._steps, other._inputs = self._slots, self._held, steps, inputs
        other.finish(outputs)
        return other

    @property
    def steps(self) -> list[Step]:
        """The steps, in order; read only."""
        return self._steps

    @property
    def inputs(self) -> list[int]:
        """The slots of the inputs, in order."""
        return self._inputs

    # --- what it holds ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tape keeps alive, parameters included; each storage counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t, *_ in self._held}
        return sum(storages.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest imaginary part that a replay computes."""
        written = {slot for step in self._steps for slot in step.writes}
        return max((self._slots[slot].entries * self._slots[slot].window.dtype.itemsize for slot in written), default=0)

    def check(self) -> None:
        """Raise :class:`TapeChangedError` if a tensor that the tape holds was overwritten since."""
        for t, version, _ in self._held:
            if t._version != version:
                raise TapeChangedError(
                    f"a tensor of shape {tuple(t.shape)} was changed in place after its use was recorded; "
                    "the recorded derivative no longer belongs to it. Evaluate at the new point."
                )

    # --- replay -------------------------------------------------------------------------------------------------

    def replay(self, directions: Iterable[Tensor]) -> list[Tensor | None]:
        """Apply the recorded maps to ``directions``, one per input, each of the shape of that input.

        Returns:
            The imaginary parts of the outputs, in their order; None where one vanishes.
        """
        return Replay(self._slots, self._overwritten).run(
            zip(self._inputs, directions, strict=True), self._steps, self._last_use, self._outputs
        )
