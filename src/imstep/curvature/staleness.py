"""Whether a loss is computed anew from the parameters each time that a closure is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from imstep.complexstep.graph import walk
from imstep.complexstep.islands import unseen

ELSEWHERE = (
    "part of what the closure returned was computed in another thread, or before the closure was called; "
    "products would miss it. Evaluate the model in the thread that calls the closure, and compute all that "
    "depends on the parameters inside the closure."
)
"""What is said of a first evaluation; of a second one see :func:`check_anew`."""

_LEAF = "torch::autograd::AccumulateGrad"


class StaleLossError(ValueError):
    """The closure's value does not follow the parameters that its derivative is taken of."""


_STALE = (
    "part of what the loss is computed from was computed before the closure was called, or is kept from one "
    "call to the next (at {}): it has a derivative, but does not follow the parameters. "
    "Compute all that depends on the parameters inside the closure, each time anew."
)


def nodes_of(loss: Tensor) -> set[tuple[str, int]]:
    """The nodes of a graph but its leaves, by name and number, so that none is kept alive."""
    return {_key(node) for node in _computed(loss.grad_fn)}


def check_fresh(loss: Tensor, again: Tensor, parameters: Sequence[Tensor]) -> None:
    """Raise if part of the way from the parameters to a loss is in the graph of a second evaluation as well.

    Args:
        loss, again: two evaluations, both with their graphs.

    Raises:
        StaleLossError: a part was computed outside the closure, or kept from one call to the next.
    """
    first = set(_computed(loss.grad_fn))
    ours = {id(p) for p in parameters}
    shared = [node for node in _computed(again.grad_fn) if node in first]
    if any(_is_leaf(node) and id(node.variable) in ours for node in walk(shared)):
        raise StaleLossError(_STALE.format(shared[0].name()))


def check_anew(loss: Tensor, parameters: Sequence[Tensor], numbers: range | None) -> None:
    """Raise if part of the way from the parameters to the loss of a further evaluation, in this thread, is older.

    Args:
        numbers: those that this thread has given to nodes of the graph since the evaluation began; None where other
            threads have a part in it, which cannot be told.

    Raises:
        StaleLossError: a part was kept from an earlier call.
    """
    if numbers is None:
        return
    with unseen():
        ours, root = {id(p) for p in parameters}, loss.grad_fn
    for node in _computed(root):
        stale = node._sequence_nr() not in numbers
        if stale and any(_is_leaf(leaf) and id(leaf.variable) in ours for leaf in walk([node])):
            raise StaleLossError(_STALE.format(node.name()))


def _computed(root: Any) -> list[Any]:
    """The nodes of a graph but its leaves."""
    return [node for node in walk([root]) if not _is_leaf(node)]


def _is_leaf(node: Any) -> bool:
    return node.name() == _LEAF


def _key(node: Any) -> tuple[str, int]:
    return node.name(), node._sequence_nr()
