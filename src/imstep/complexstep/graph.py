"""What autograd's graph of a loss leads to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_UNNUMBERED = 2**64 - 1  # the node of a leaf


@dataclass(frozen=True, eq=False)
class Survey:
    """What graphs lead to.

    Attributes:
        reached: whether to one of the parameters.
        others: leaves beside the parameters.
        foreign: whether a node on the way to a parameter was made elsewhere: in another thread, or earlier.
    """

    reached: bool = False
    others: list[Tensor] = field(default_factory=list)
    foreign: bool = False

    def __add__(self, other: Survey) -> Survey:
        return Survey(
            self.reached or other.reached, [*self.others, *other.others], self.foreign or other.foreign
        )


def survey(outputs: Sequence[Tensor], parameters: Sequence[Tensor], numbers: range) -> Survey:
    """What the graphs of ``outputs`` lead to.

    Args:
        parameters: leaves to tell from others.
        numbers: those that this thread has given to nodes since the evaluation began. Each thread counts for itself, so
            a node of another thread shows by a number beyond them, or by one that two nodes have.
    """
    own = {id(p) for p in parameters}
    with torch._C.DisableTorchFunction():
        roots = [t.grad_fn for t in outputs]
        leaves = [t for t, node in zip(outputs, roots, strict=True) if node is None and t.requires_grad]
    taken: set[int] = set()
    foreign = []
    for node in walk(roots):
        number = node._sequence_nr()
        if number == _UNNUMBERED:
            leaves.append(node.variable)
            continue
        if number not in numbers or number in taken:
            foreign.append(node)
        taken.add(number)
    found = [t for t in leaves if id(t) in own]
    others = [t for t in leaves if id(t) not in own]
    return Survey(bool(found), others, bool(found) and any(leads_to(node, parameters) for node in foreign))


def leads_to(node: Any, parameters: Sequence[Tensor]) -> bool:
    """Whether a node depends on one of the parameters."""
    own = {id(p) for p in parameters}
    return any(id(getattr(below, "variable", None)) in own for below in walk([node]))


def walk(roots: Iterable[Any]) -> Iterator[Any]:
    """The nodes that some lead to, and these themselves, each once; a root may be None."""
    waiting, seen = list(roots), {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]
