"""Where the imaginary parts of an evaluation are kept: beside the storages of tensors, or as slots of a tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from imstep.complexstep.errors import DENSE, UnsupportedOperatorError
from imstep.complexstep.islands import Islands
from imstep.complexstep.steps import Reference, Step
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Plane, whole


class Carrier(TorchDispatchMode):
    """What a mode does to the imaginary parts of an operator's arguments and results, whatever the operator.

    Without a tape they are numbers on the plane; with one they are slots, and what happens to them is recorded.
    """

    def __init__(self, plane: Plane, islands: Islands, tape: Tape | None) -> None:
        super().__init__()
        self._plane, self._islands, self._tape = plane, islands, tape

    def _imaginary(self, t: Any) -> Any:
        if isinstance(t, (list, tuple)):
            return [self._imaginary(u) for u in t]
        return None if t is None else self._plane.get(t)

    def _store(self, outputs: Any, d_outputs: Any) -> None:
        """Attach imaginary parts to fresh outputs; one that shares memory with an argument has its own already."""
        if isinstance(outputs, Tensor):
            if d_outputs is not None and self._plane.find(outputs) is None:
                _refuse_layout(outputs)
                self._plane.put(outputs, d_outputs)
        elif d_outputs is not None and isinstance(outputs, (list, tuple)):
            for output, d_output in zip(outputs, d_outputs, strict=True):
                self._store(output, d_output)

    def reference(self, t: Tensor) -> Reference | None:
        """The slot on the tape, and the window onto it, that a tensor stands for; None for a constant."""
        slot = self._plane.find(t)
        return None if slot is None else self._tape.reference(slot, t)  # type: ignore[union-attr]

    def _references(self, tensors: Sequence[Any], slots: Sequence[Any] | None) -> list[Any]:
        """As :meth:`reference`, for nested tensors to which slots are attached."""
        found: list[Any] = []
        for t, slot in zip(tensors, slots or [None] * len(tensors), strict=True):
            if type(slot) is int:
                found.append(self._tape.reference(slot, t))  # type: ignore[union-attr]
            else:
                found.append(self._references(t, slot) if isinstance(t, (list, tuple)) else None)
        return found

    def _define(self, outputs: Any) -> Any:
        """New slots for fresh outputs that can carry an imaginary part."""
        if isinstance(outputs, (list, tuple)):
            return [self._define(t) for t in outputs]
        if not isinstance(outputs, Tensor) or not (outputs.is_floating_point() or outputs.is_complex()):
            return None
        _refuse_layout(outputs)
        return self._plane.named(outputs, self._tape.define)  # type: ignore[union-attr]

    def _step(
        self, func: OpOverload, push: Any, inputs: list[Any], outputs: Any, target: Reference | None = None
    ) -> Step:
        """A step of the tape, with the node of autograd's graph that its operator belongs to."""
        return Step(push, inputs, outputs, target, func, self._node(), self._islands.final)

    def _node(self) -> int:
        """The sequence number of the node of autograd's graph that the present operator belongs to."""
        if not self._islands.final:  # the node is made before the operator runs, so it has the last number given out
            return torch.autograd._get_sequence_nr() - 1
        current = torch._C._current_autograd_node()
        return -1 if current is None else current._sequence_nr()

    # --- written over ------------------------------------------------------------------------------------------

    def _overwrite(self, targets: Any, results: Any, given: list[Any]) -> None:
        """Write results over targets, a tensor or a list over each; a result may be one of the tensors given."""
        given = [u for t in given for u in (t if isinstance(t, (list, tuple)) else [t]) if isinstance(u, Tensor)]
        kept = {t.untyped_storage()._cdata for t in given if t.layout is torch.strided}
        if isinstance(results, Tensor):
            results = [results]
        elif len(targets) == 1 and isinstance(targets[0], (list, tuple)):
            targets = targets[0]
        for target, result in zip(targets, results, strict=True):
            if target.shape != result.shape:
                self._resize(torch.ops.aten.resize_.default, (target, result.shape), {})
            if self._tape is not None:
                self._tape.protect(target)
            if result.untyped_storage()._cdata not in kept and self._plane.interchangeable(target, result):
                target.copy_(result)
                self._plane.hand_over(result, target)
            else:
                self._copy(torch.ops.aten.copy_.default, (target, result), {})

    def _resize(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Another window, onto memory that may have grown; what is new of it has no imaginary part."""
        target = args[0]
        held, before = self._plane.find(target), whole(target)
        outputs = func(*args, **kwargs)
        if held is None or before.numel() == whole(target).numel():
            return outputs
        if self._tape is None:
            self._plane.extend(target, before)
            return outputs
        self._plane.name(target, self._tape.define(whole(target)))
        source, goal = self._tape.reference(held, before), self._tape.reference(self._plane.find(target), before)
        self._tape.record(self._step(torch.ops.aten.copy_.default, None, [source], None, goal))
        return outputs

    def _copy(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        target, source = args[0], args[1]
        outputs = func(*args, **kwargs)
        if not (target.is_floating_point() or target.is_complex()):
            return outputs
        if self._tape is None:
            self._plane.write(target, self._plane.get(source))
            return outputs
        read = self.reference(source)
        if self._plane.find(target) is None:
            if read is None:
                return outputs
            self._plane.name(target, self._tape.define(whole(target)))
        self._tape.record(self._step(func, None, [read], None, self.reference(target)))
        return outputs


def _refuse_layout(t: Tensor) -> None:
    if t.layout is not torch.strided:
        raise UnsupportedOperatorError(str(t.layout), "a tensor of this layout carries no imaginary part.", DENSE)
