"""An evaluation run again at other parameters as a flat list of operators: without the user's code, graph or modes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.complexstep.operations import Operation, Reference, UnlikeError, Values, Views
from imstep.complexstep.tensor import Window


class Rerun:
    """A list of operators.

    Args:
        parameters: the tensors that it reads, whose values change.
        windows: of each slot.
        steps: in order.
        dead: the slots that are needed no more after each.
        constants: tensors that it holds, with their versions.
        end: what it computes.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        windows: Sequence[Window],
        steps: Sequence[Operation],
        dead: Sequence[Sequence[int]],
        constants: Sequence[tuple[Tensor, int]],
        end: Reference,
    ) -> None:
        self._parameters, self._windows, self._steps, self._dead = parameters, windows, list(steps), dead
        self._constants, self._end = constants, end
        self._views: Views = {slot: {} for slot in range(len(parameters))}  # of parameters, which stay where they are

    def __len__(self) -> int:
        return len(self._steps)

    def __call__(self) -> Tensor:
        """The output at the parameters' present values.

        Raises:
            UnlikeError: a tensor was overwritten since, or came out in another form.
        """
        if any(t._version != version for t, version in self._constants):
            raise UnlikeError("a constant was overwritten.")
        values: Values = dict(enumerate(self._parameters))
        with torch._C._AutoDispatchBelowAutograd(), torch._C.DisableTorchFunction():
            for step, dead in zip(self._steps, self._dead, strict=True):
                self._carry_out(step, values)
                for slot in dead:
                    values.pop(slot, None)
            return self._end.read(values)

    def _carry_out(self, step: Operation, values: Values) -> None:
        args, kwargs = step.arguments(values, self._views)
        result = step.func(*args, **kwargs)
        if not step.outputs:
            return
        for slot, t in zip(step.outputs, result if isinstance(result, (list, tuple)) else (result,), strict=True):
            if slot is None:
                continue
            first = self._windows[slot]
            if t.shape != first.size or t.stride() != first.stride or t.dtype is not first.dtype:
                raise UnlikeError(f"{step.func} gave another form.")
            values[slot] = t
