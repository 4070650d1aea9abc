"""The steps of a tape: linear maps between slots of imaginary memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload

from imstep.complexstep.tensor import Window

Reference = tuple[int, Window | None]


@dataclass(frozen=True)
class Slot:
    """The imaginary part of one storage: its first window onto it, and how many entries the storage has."""

    window: Window
    entries: int


@dataclass(frozen=True, eq=False)
class Call:
    """Where a linear map comes from.

    Attributes:
        func: the operator.
        args: its arguments, where the operator may be a loss; else empty.
        result: its output, likewise; else None.
        backward: whether it belongs to the backward pass that is being differentiated.
        node: sequence number of the node of autograd's graph that it belongs to.
        alpha: factor of the second argument of a sum or difference.
    """

    func: OpOverload
    args: tuple[Any, ...]
    result: Any
    backward: bool
    node: int
    alpha: Any = 1


@dataclass(frozen=True, eq=False)
class Step:
    """A linear map ``push`` from ``inputs`` to ``outputs``; without ``push``, a write into the window ``target``."""

    push: Any
    inputs: list[Any]
    outputs: Any
    call: Call
    target: Reference | None = None

    @property
    def writes(self) -> list[int]:
        """The slots that this step defines or overwrites."""
        return [self.target[0]] if self.target else list(flat(self.outputs))

    @property
    def reads(self) -> list[int]:
        """The slots that this step looks at."""
        return [ref[0] for ref in flat(self.inputs)]


def flat(nested: Any) -> Iterator[Any]:
    """The entries of nested lists that are not None."""
    for item in nested if isinstance(nested, list) else [nested]:
        if isinstance(item, list):
            yield from flat(item)
        elif item is not None:
            yield item
