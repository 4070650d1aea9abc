"""Where a backward pass meets the outputs of the operators that take the parameters.

The gradient with respect to the output of an operator is what autograd hands to the operator's node. Where on a tape it
lies is noted as it is handed over: later its memory may hold something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from imstep.complexstep.steps import Reference, Step

if TYPE_CHECKING:
    from imstep.complexstep.tape import Tape

Find = Callable[[Tensor], "Reference | None"]


class Cotangents:
    """Notes taken while a tape is recorded.

    Attributes:
        met: by the number of a node of autograd's graph, after how many steps of the tape a backward pass came to it,
            and where the gradient with respect to its first output lay; more than once if several passes did.
    """

    def __init__(self) -> None:
        self.met: dict[int, list[tuple[int, Reference]]] = {}

    def watch(self, tape: Tape, nodes: Iterable[Any], find: Find) -> list[Any]:
        """Have nodes that belong to operators on the inputs tell when a backward pass comes to them.

        Returns:
            Handles to be removed after the pass.
        """
        wanted = {step.node: step for step in uses(tape)}
        handles = []
        for node in nodes:
            step = wanted.get(node._sequence_nr())
            if step is not None and _belongs(node, step):
                self.met.setdefault(step.node, [])
                handles.append(node.register_prehook(partial(self._note, tape, step.node, find)))
        return handles

    def _note(self, tape: Tape, node: int, find: Find, gradients: Sequence[Tensor | None]) -> None:
        reference = None if gradients[0] is None else find(gradients[0])
        if reference is not None:
            self.met[node].append((len(tape.steps), reference))


def uses(tape: Tape) -> list[Step]:
    """The steps of the forward pass that take an input itself."""
    inputs = set(tape.inputs)
    return [step for step in tape.steps if not step.backward and not inputs.isdisjoint(step.reads())]


def _belongs(node: Any, step: Step) -> bool:
    """Whether a node is that of the step's operator, and not of a Function or a checkpoint around it."""
    kind = node.name().split("Backward")[0].lower()
    return bool(kind == step.func.overloadpacket.__name__.replace("_", ""))
