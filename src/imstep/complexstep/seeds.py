"""Tapes that begin and end between operators: at outputs of layers in place of their weights.

A loss is a function of what would be added to the output of a layer. Its second derivatives in these additions are on
the tape of the gradient's derivative as well: a direction enters where the output is computed, and what comes of it is
read where the backward pass meets the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.replay import Slot
from imstep.complexstep.steps import Reference, Step, slot_of
from imstep.complexstep.tape import Tape

_clone = torch.ops.aten.clone.default


class Between:
    """A tape in the making, from additions to outputs of steps to changes of gradients there.

    Args:
        tape: with notes of cotangents.
    """

    def __init__(self, tape: Tape) -> None:
        assert tape.cotangents is not None
        self._tape, self._met = tape, tape.cotangents.met
        self._slots = list(tape.slots)
        self._replaced: dict[int, Step] = {}
        self._put_in: list[Step] = []
        self._inputs: list[int] = []
        self._outputs: list[Reference] = []
        self._instead: dict[tuple[int, int], int] = {}  # by node and slot, what its backward steps read

    def add_to(self, step: Step) -> None:
        """The next input is added to the first output of a step."""
        slot = self._input(self._slots[first_output(step)])
        self._replaced[id(step)] = step.adding(slot)

    def add_to_gradient(self, step: Step) -> None:
        """The next input is added to the gradient with respect to the output of a step, as its node sees it."""
        slot = self._input(self._like(self._met[step.node][0][1]))
        self._change(step, [slot], lambda change, added: added if change is None else change + added)

    def subtract_from_gradient(self, step: Step, of_output: Callable[[Tensor], Tensor]) -> None:
        """A function of the change of the output of a step is subtracted from that of the gradient there."""
        output = self._kept(step.number + 1, first_output(step))

        def without(change: Tensor | None, of: Tensor | None) -> Tensor | None:
            if of is None:
                return change
            return -of_output(of) if change is None else change - of_output(of)

        self._change(step, [output], without)

    def read(self, step: Step) -> int:
        """The next outputs, and how many they are, add up to the gradient with respect to the output of a step."""
        found = self._met[step.node]
        for number, reference in found:
            changed = self._instead.get((step.node, slot_of(reference)))
            self._outputs.append(self._kept(number, reference) if changed is None else changed)
        return len(found)

    def read_output(self, step: Step) -> int:
        """The next output, of which there is one, is the change of the output of a step."""
        self._outputs.append(self._kept(step.number + 1, first_output(step)))
        return 1

    def finish(self) -> Tape:
        """The tape."""
        changed = {node for node, _ in self._instead}
        steps = [
            self._rewired(step) if step.backward and step.node in changed else self._replaced.get(id(step), step)
            for step in self._tape.steps
        ]
        # What was put in for a place comes before the step that was next there; the sort is stable.
        steps = sorted([*self._put_in, *steps], key=lambda step: step.number)
        return self._tape.rebuilt(self._slots, steps, self._inputs, self._outputs)

    def _kept(self, number: int, reference: Reference) -> int:
        """A slot that keeps what a reference shows after so many steps."""
        slot = self._new(self._like(reference))
        self._insert(number, Step(lambda change: change, [reference], slot, None, _clone, -1, True))
        return slot

    def _change(self, step: Step, others: list[int], change: Callable[..., Tensor | None]) -> None:
        """Have the node of a step see a function of its gradient and of other slots; other nodes may share that."""
        ((number, reference),) = self._met[step.node]
        slot = self._new(self._like(reference))
        self._insert(number, Step(change, [reference, *others], slot, None, _clone, -1, True))
        self._instead[step.node, slot_of(reference)] = slot

    def _rewired(self, step: Step) -> Step:
        return step.reading([self._elsewhere(step.node, ref) for ref in step.inputs])

    def _elsewhere(self, node: int, ref: Any) -> Any:
        if isinstance(ref, list):
            return [self._elsewhere(node, r) for r in ref]
        slot = None if ref is None else self._instead.get((node, slot_of(ref)))
        return ref if slot is None else (slot, self._tape.window(ref))

    def _insert(self, number: int, step: Step) -> None:
        step.number = number
        self._put_in.append(step)

    def _like(self, reference: Reference) -> Slot:
        return Slot(self._tape.window(reference), self._slots[slot_of(reference)].entries)

    def _new(self, slot: Slot) -> int:
        self._slots.append(slot)
        return len(self._slots) - 1

    def _input(self, slot: Slot) -> int:
        self._inputs.append(self._new(slot))
        return self._inputs[-1]


def first_output(step: Step) -> int:
    """The slot of a step's first output."""
    slot = step.outputs[0] if isinstance(step.outputs, list) else step.outputs
    assert isinstance(slot, int)
    return slot

