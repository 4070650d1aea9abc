"""The backward pass of an evaluation as a flat list of operators, run again without autograd and without modes.

What a backward pass does follows from the forward pass: from its operators with all numbers among their arguments, and
from the graph that autograd has made of them. Where both are as they were, and no user's code runs in between, the
operators of an earlier backward pass are carried out one after the other on what this forward pass has computed, and
each leaves its linear map on the tape as it would have done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imstep.complexstep.gradients import is_users_function
from imstep.complexstep.islands import unseen
from imstep.complexstep.operations import Operation, Reference, UnlikeError, Values, dead_after, entries
from imstep.complexstep.registry import lookup
from imstep.complexstep.report import Ledger
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Window

UNNUMBERED = 2**64 - 1
"""The number of all nodes that stand for leaves."""


class Anatomy(NamedTuple):
    """The graph behind a loss.

    Attributes:
        form: of each node what it is, and the nodes and inputs of these that it leads to.
        numbers: their sequence numbers.
        runs_code: whether one is an ``autograd.Function`` of the user's.
    """

    form: list[Any]
    numbers: list[int]
    runs_code: bool

    @classmethod
    def of(cls, loss: Tensor, inputs: Sequence[Tensor]) -> Anatomy:
        """That of a loss as a function of ``inputs``."""
        with unseen():
            first, leaf = loss.grad_fn, {id(t): at for at, t in enumerate(inputs)}
        nodes, place = [first], {first: 0}
        form: list[Any] = []
        for node in nodes:  # grows as it goes
            following = []
            for other, number in node.next_functions:  # type: ignore[union-attr]
                at = place.get(other)
                if at is None and other is not None:
                    at = place[other] = len(nodes)
                    nodes.append(other)
                following.append((at, number))
            ends = None if following else leaf.get(id(getattr(node, "variable", None)), -1)
            form.append((type(node), node.name(), ends, following))  # type: ignore[union-attr]
        runs_code = any(map(is_users_function, nodes))
        return cls(form, [node._sequence_nr() for node in nodes], runs_code)  # type: ignore[union-attr]


class Need(NamedTuple):
    """A tensor of the forward pass that the backward pass needs: which argument of a step, or ~which result."""

    place: int
    number: int
    window: Window

    def of(self, arguments: Sequence[Tensor], results: Sequence[Any]) -> Tensor | None:
        """The tensor, if there is one of the same form."""
        tensors, at = (arguments, self.place) if self.place >= 0 else (results, ~self.place)
        t = tensors[at] if at < len(tensors) else None
        return t if t is not None and t.layout is torch.strided and self.window.fits(t) else None


class Line(NamedTuple):
    """An operator, whether its map goes onto the tape, and the place of its node in the graph, or -1 for none."""

    operation: Operation
    maps: bool
    node: int


class Program:
    """A backward pass.

    Args:
        literals: of each step of the forward pass, what its operator is given besides tensors.
        needs: of each of these, what is needed of it.
        anatomy: of the graph.
        lines: the operators.
        results: the gradients.
    """

    def __init__(
        self,
        literals: list[Any],
        needs: list[list[Need]],
        anatomy: Anatomy,
        lines: list[Line],
        results: list[Reference | None],
    ) -> None:
        self.literals, self.needs, self.form, self.results = literals, needs, anatomy.form, results
        needed = {ref.slot for ref in results if ref is not None}
        self._lines = list(zip(lines, dead_after([line.operation for line in lines], needed), strict=True))

    def run(self, values: Values, tape: Tape, numbers: Sequence[int], ledger: Ledger) -> list[Tensor | None]:
        """The gradients; their derivatives go onto ``tape``.

        Args:
            values: what the forward pass has left of the needed tensors; used up.
            numbers: of the nodes of the graph.
            ledger: where the operators are entered.

        Raises:
            UnlikeError: something came to another form.
        """
        below = torch._C._AutoDispatchBelowAutograd(), torch._C._DisableTorchDispatch(), torch._C._DisableAutocast()
        with below[0], below[1], below[2], unseen():
            for (operation, maps, node), dead in self._lines:
                args, kwargs = operation.arguments(values)
                if maps:
                    node = numbers[node] if node >= 0 else node
                    outputs = _linearised(operation, tuple(args), kwargs, tape, node, ledger)
                else:
                    outputs = operation.func(*args, **kwargs)
                for number, t in zip(operation.outputs, entries(outputs), strict=True):
                    if number is not None:
                        values[number] = t
                for number in dead:
                    values.pop(number, None)
            return [None if ref is None else ref.read(values) for ref in self.results]


def _linearised(operation: Operation, args: Any, kwargs: Any, tape: Tape, node: int, ledger: Ledger) -> Any:
    """The outputs of an operator, whose map goes onto the tape."""
    func, foreseen = operation.func, tape.foreseen
    rule = lookup(func)
    if foreseen is None or rule is None:
        raise UnlikeError(f"{func} has other outputs.")
    ledger.enter(func, rule.family)
    try:
        outputs, push = rule.linearize(func, args, kwargs)
    finally:
        ledger.leave()
    if push is None:
        raise UnlikeError(f"{func} has no derivative here.")
    for number, t in zip(operation.outputs, entries(outputs), strict=True):
        if number is not None and number >= 0 and tape.define(t) != number:
            raise UnlikeError(f"{func} has other outputs.")
    if tape.foreseen is not foreseen:
        raise UnlikeError(f"{func} gave another form.")
    tape.record(foreseen.step.again(push, node), known=True)
    return outputs


def literals(args: Any, kwargs: Any) -> list[Any]:
    """What an operator is given besides tensors, to be compared."""
    found = [_literal(a) for a in args]
    return [*found, *((name, _literal(a)) for name, a in kwargs.items())] if kwargs else found


def _literal(a: Any) -> Any:
    if isinstance(a, Tensor):
        return Tensor
    if isinstance(a, (list, tuple)):
        return [_literal(b) for b in a]
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    return (float, a, math.copysign(1.0, a)) if type(a) is float else (type(a), a)
