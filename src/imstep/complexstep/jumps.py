"""Angles and signs of zero: the function jumps there, so that nothing made of it has a derivative.

Unlike the gradient of a root, PyTorch's gradient of an angle does not look at its value, and a jump may be of any size.
So what depends on it is found by its value: an arithmetic below the one that differentiates carries an imaginary part
that is not a number, which selections drop and all else passes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from imstep.complexstep.errors import user_place
from imstep.complexstep.missing import Missing, depends
from imstep.complexstep.report import Ledger
from imstep.complexstep.tape import Tape
from imstep.complexstep.tensor import Plane
from imstep.complexstep.vanishing import Root

aten = torch.ops.aten

JUMPS = {id(op) for op in (aten.atan2.default, aten.angle.default, aten.sgn.default)}
"""Operators that jump at zero, by identity; of real numbers as well, but there as PyTorch's conventions have it."""


def at_zero(func: OpOverload, tensors: Sequence[Any]) -> Tensor | None:
    """Where ``func`` jumps in more than one way; None for nowhere."""
    if func is not aten.atan2.default:
        zero = tensors[0] == 0 if tensors[0].is_complex() else None
    else:
        zero = (tensors[0] == 0) & (tensors[1] == 0)
    return zero if zero is not None and bool(zero.any()) else None


class Jumps:
    """The jumps that one evaluation has come upon.

    Args:
        follower: an arithmetic to follow what they have a part in.
        plane: its imaginary parts.
        ledger: where a missing derivative is entered.
    """

    def __init__(self, follower: AbstractContextManager[Any], plane: Plane, ledger: Ledger) -> None:
        self._follower, self._plane = follower, plane
        self._jumps: list[Root] = []
        self._inside = False
        self._missing = Missing(ledger, _REASON)

    def note(self, func: OpOverload, value: Tensor, zero: Tensor, parts: Sequence[Any], on_tape: bool) -> None:
        """``func`` jumps where ``zero`` says; ``parts`` are its arguments' imaginary parts, references on a tape."""
        size = lambda ims: sum((d.abs() for d in ims if d is not None), torch.zeros_like(zero, dtype=value.real.dtype))
        jump = Root(func, user_place(), False, False, size, zero, 0)
        if on_tape:
            jump.references = list(parts)
        else:
            jump.look(parts)
        self._jumps.append(jump)
        known = self._plane.get(value)
        self._plane.write(value, torch.where(zero, math.nan, 0 if known is None else known).to(value.dtype))

    def concern(self, tensors: Sequence[Any]) -> bool:
        """Whether a jump has a part in the arguments of an operator."""
        return not self._inside and self._plane.attached(tensors) is not None

    def follow(self, run: Callable[[], Any]) -> Any:
        """Carry out an operator by ``run``, followed."""
        with self._follower:
            self._inside = True
            try:
                return run()
            finally:
                self._inside = False

    def settle(self, results: Sequence[Tensor | None]) -> None:
        """The evaluation has come to results, or to what a backward pass begins at."""
        if any(t is not None and depends(t, self._plane.get(t)) for t in results):
            for jump in self._jumps:
                self._missing.lose(jump)

    def conclude(self, tape: Tape | None) -> None:
        """Nothing more is evaluated."""
        self._missing.conclude([jump for jump in self._jumps if jump.lost], tape)


_REASON = (
    "is taken of zero, where it jumps and has no derivative: that is taken to be 0, as in PyTorch's gradient. If it "
    "does not matter there, select another value by torch.where; if it is to count, keep the argument away from zero."
)
