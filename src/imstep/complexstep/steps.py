"""The steps of a tape: linear maps between slots of imaginary memory."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from imstep.complexstep.tensor import Window

_aten = torch.ops.aten

Reference = int | tuple[int, Window]
"""What a tensor is on a tape: a slot as it was defined, or a slot seen through another window."""


EXCHANGES: set[int] = set()
"""Operators, by identity, that exchange tensors with other processes, which wait for it."""


LOSS_OPERATORS = {
    _aten.mul.Tensor,
    _aten.mul.Scalar,
    _aten.div.Tensor,
    _aten.div.Scalar,
    _aten.dot.default,
    _aten.mv.default,
    _aten.pow.Tensor_Scalar,
    _aten.mse_loss.default,
    _aten.huber_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.binary_cross_entropy.default,
    _aten.binary_cross_entropy_with_logits.default,
    _aten.softplus.default,
    _aten.exp.default,
    _aten._log_softmax.default,
    _aten.logsumexp.default,
    _aten._softmax.default,
    _aten.sigmoid.default,
    _aten.log_sigmoid_forward.default,
    _aten.log.default,
    _aten.log1p.default,
    _aten.xlogy.Tensor,
    _aten.xlogy.Scalar_Self,
    _aten.clamp.default,
    _aten.clamp.Tensor,
    _aten.clamp_min.default,
    _aten.clamp_max.default,
    _aten.soft_margin_loss.default,
}
"""Operators that may stand between a model's outputs and the loss; their arguments are kept for a second look."""


class Step:
    """A linear map ``push`` from ``inputs`` to ``outputs``; without ``push``, a write into ``target``.

    Attributes:
        push: the map.
        inputs: a reference for each of its arguments, None for a constant; a list where it takes a list.
        outputs: the slots that it defines, nested as what it returns.
        target: what a write overwrites.
        func: the operator that it belongs to.
        node: sequence number of the node of autograd's graph that the operator belongs to.
        backward: whether that is of the backward pass that is being differentiated.
        args: the operator's arguments, where it may be a loss; else empty.
        result: its output, likewise; else None.
        alpha: factor of the second argument of a sum or difference.
        exchanges: whether other processes wait for it, so that it is to be taken also where it comes to nothing.
        number: of steps that were recorded before it.
    """

    __slots__ = (
        *("alpha", "args", "backward", "exchanges", "func", "inputs", "node", "number", "outputs", "push", "result"),
        *("target", "_reads", "_writes"),
    )

    def __init__(
        self,
        push: Any,
        inputs: list[Any],
        outputs: Any,
        target: Reference | None,
        func: OpOverload,
        node: int,
        backward: bool,
    ) -> None:
        self.push, self.inputs, self.outputs, self.target = push, inputs, outputs, target
        self.func, self.node, self.backward = func, node, backward
        self.args: tuple[Any, ...] = ()
        self.result: Any = None
        self.alpha: Any = 1
        self.number = 0
        self.exchanges = id(func) in EXCHANGES
        self._reads = _slots(inputs)
        self._writes = _slots([outputs if target is None else target])

    def reads(self) -> list[int]:
        """The slots that this step looks at."""
        return self._reads

    def writes(self) -> list[int]:
        """The slots that this step defines or overwrites."""
        return self._writes

    def again(self, push: Any, node: int) -> Step:
        """The same step of another evaluation, with a map of its own."""
        other = Step.__new__(Step)
        other.push, other.inputs, other.outputs, other.target = push, self.inputs, self.outputs, self.target
        other.func, other.node, other.backward, other.exchanges = self.func, node, self.backward, self.exchanges
        other.args, other.result, other.alpha, other.number = (), None, 1, self.number
        other._reads, other._writes = self._reads, self._writes
        return other

    def reading(self, inputs: list[Any]) -> Step:
        """The same step with other inputs."""
        return self._like(self.push, inputs)

    def adding(self, seed: int) -> Step:
        """The same step, with what is in the slot ``seed`` added to its first output."""
        push, several = self.push, type(self.outputs) is list

        def pushed(*ims: Any) -> Any:
            *ims, added = ims  # type: ignore[assignment]
            made = push(*ims) if flat(list(ims)) else None
            parts = list(made) if several and made is not None else [made]
            parts[0] = added if parts[0] is None else parts[0] + added
            return parts + [None] * (len(self.outputs) - len(parts)) if several else parts[0]

        return self._like(pushed, [*self.inputs, seed])

    def _like(self, push: Any, inputs: list[Any]) -> Step:
        other = Step(push, inputs, self.outputs, self.target, self.func, self.node, self.backward)
        other.number = self.number
        return other


def _slots(references: list[Any]) -> list[int]:
    """The slots that nested references look at."""
    found: list[int] = []
    for ref in references:
        kind = type(ref)
        if kind is int:
            found.append(ref)
        elif kind is tuple:
            found.append(ref[0])
        elif kind is list:
            found += _slots(ref)
    return found


def slot_of(reference: Reference) -> int:
    """The slot that a reference looks at."""
    return reference[0] if type(reference) is tuple else reference  # type: ignore[return-value]


def flat(nested: list[Any]) -> list[Any]:
    """The entries of nested lists that are not None."""
    found = [item for item in nested if item is not None]
    if list not in map(type, found):
        return found
    return [entry for item in found for entry in (flat(item) if type(item) is list else [item])]
