"""The loss at other points than those of a step: does what it gains hold there?"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from imstep.callers import users_level
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.optim.evaluable import failing_as
from imstep.optim.micro_batches import MicroBatches
from imstep.optim.recall import new_points

FALL = 4.0
"""By so much the loss at the points of the steps must have fallen since the loss elsewhere last did."""

LESS = 0.9
"""Of the loss elsewhere: what is no less than this has not fallen."""

GAP = 2.0
"""By so much the loss elsewhere must be above it all that time: two draws of few points differ as well."""

PATIENCE = 5
"""Steps for which the loss elsewhere must not have fallen."""

LOOK = 10
"""Steps after which it is looked whether they have held at the points of the next, where points are drawn anew."""

APART = 100.0
"""By so much, in the geometric mean, the loss at the points of the next is above that where a step has ended."""

FALLEN = 0.1
"""Of the loss at new points: what is no more than this has fallen, however far apart those two are."""


class OverfittingWarning(UserWarning):
    """The loss falls at the points of the steps only."""


@dataclass(frozen=True)
class CheckHistory:
    """What checks have found so far.

    Attributes:
        last: the loss elsewhere when it was last evaluated; nan before.
        size: norm of the parameters there, by which they are known again.
        least: the loss elsewhere when it last fell, or was near that at the points of the steps.
        beside: the latter beside it, before a step.
        since: steps since then.
        warned: whether a warning was given.
    """

    last: float = math.nan
    size: float = math.nan
    least: float = math.inf
    beside: float = math.nan
    since: int = 0
    warned: bool = False

    def meet(self, loss: float, check: float) -> CheckHistory:
        """The history where a step begins: the loss at its points, and elsewhere.

        It is the loss before a step, so that with points that are new to each step it is a loss elsewhere, too.
        """
        if check < LESS * self.least or check <= GAP * loss:
            return replace(self, least=check, beside=loss, since=0)
        return replace(self, since=self.since + 1)

    def overfits(self, loss: float) -> bool:
        """Whether the loss at the points of the steps has gone on falling, down to ``loss``, and that elsewhere not."""
        return self.since >= PATIENCE and loss * FALL <= self.beside

    def warn(self, loss: float) -> CheckHistory:
        """Say so, once."""
        if self.warned or not self.overfits(loss):
            return self
        warnings.warn(
            f"in the last {self.since} steps the loss at the points of the steps fell from {self.beside:.1e} to "
            f"{loss:.1e}, and the loss at the points of check did not fall by a tenth from {self.least:.1e}: the "
            "network fits these points, and may be wrong between them. Draw new points for every step (outside of the "
            "closure), or more of them. See docs/redrawn-points.md.",
            OverfittingWarning,
            stacklevel=users_level(),
        )
        return replace(self, warned=True)


@dataclass(frozen=True)
class DrawHistory:
    """How steps have held at the points of the next ones, where these are drawn anew.

    Attributes:
        steps: of the present look.
        apart: Σ log(loss at new points / loss where the step before has ended at its own) over these.
        first: the loss at new points in the first of them.
        largest: the largest loss so far.
        warned: whether a warning was given.
    """

    steps: int = 0
    apart: float = 0.0
    first: float = math.nan
    largest: float = 0.0
    warned: bool = False

    def meet(self, loss: float, last: float) -> DrawHistory:
        """The history where a step begins, given the loss at its points and that with which the last one has ended."""
        if not (0 < loss < math.inf and 0 <= last < math.inf and new_points(loss, last)):
            return replace(self, steps=0)
        whole = self if 0 < self.steps < LOOK else replace(self, steps=0, apart=0.0, first=loss)
        apart = whole.apart + math.log(loss / max(last, sys.float_info.min))
        return replace(whole, steps=whole.steps + 1, apart=apart, largest=max(self.largest, loss))

    def warn(self, loss: float, size: int, eps: float) -> DrawHistory:
        """Say, once, that steps hold at their own points only, where that is so: ``size`` parameters, rounding ``eps``.
        """
        apart = math.exp(self.apart / LOOK)
        seen = self.steps == LOOK and apart >= APART
        if self.warned or not seen or loss <= max(FALLEN * self.first, eps * self.largest):
            return self
        warnings.warn(
            f"in the last {LOOK} steps the loss at new points was {apart:.0e} times the loss where the step before had "
            f"ended at its own, and went from {self.first:.1e} to {loss:.1e}: steps fit their own points alone, which "
            f"are too few for {size:,} parameters. Draw more for each step (imstep.optim.GrowingPoints says how many). "
            "See docs/redrawn-points.md.",
            OverfittingWarning,
            stacklevel=users_level(),
        )
        return replace(self, warned=True)


class Check:
    """A loss at other points, evaluated where the parameters are.

    Args:
        closure: as a step takes it; returns the loss, or calls ``backward()`` on it, which is skipped.
        parameters: the vector that steps move.
    """

    def __init__(self, closure: Callable[[], Any], parameters: ParameterVector) -> None:
        if not callable(closure) and not isinstance(closure, (list, tuple)):
            raise TypeError(
                f"check must be a closure that returns the loss at other points, got a {type(closure).__name__}. Pass "
                "a function such as lambda: loss(other_points), or leave it out."
            )
        pieces = MicroBatches.of(closure)
        self._closure, self._parameters = closure if pieces is None else pieces.checked(), parameters

    @failing_as(math.nan)
    def loss(self) -> float:
        """The loss now; buffers that the closure overwrites are put back, random numbers that it draws are used up."""
        frozen = FrozenClosure(self._returned, self._parameters)
        try:
            return float(frozen.loss_with_graph(frozen.watch()).detach())
        finally:
            frozen.leave(accepted=False)

    def _returned(self) -> Any:
        value = self._closure()
        return torch.tensor(value) if isinstance(value, (int, float)) else value
