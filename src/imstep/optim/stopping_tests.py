"""When to stop: tests that no unit of the function or of its variables enters."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real

import torch
from torch import Tensor

from imstep.optim.record import StepRecord
from imstep.optim.stationarity import Stationarity

SLOW = 0.2
"""Ratio of two successive steps from which convergence counts as slow."""

RUN = 5
"""Slow steps in a row that show a minimum without curvature, such as that of x⁴."""

CRAWL = 0.05
"""Of the loss: steps of least squares that lower it by less, several in a row, are looked into."""


class Termination(Enum):
    """Why :func:`minimize` ended; a member's value is its message."""

    GRADIENT = "at a minimum by gtol: Newton's step from here would lower the function by no more than gtol² of itself"
    STEP = "at a minimum by xtol: Newton's step from here would be no longer than xtol of x"
    DECREASE = "at a minimum by ftol: the last step and Newton's next lower the function by no more than ftol of itself"
    CONVERGED = "at a minimum by tol: the gradient norm is within it, and no direction of negative curvature was found"
    PRECISION = "at a minimum: what is left of the gradient, or to gain, is within rounding"
    MAX_ITERATIONS = "the limit on iterations was reached"
    NO_PROGRESS = (
        "several steps in a row lowered nothing or left every entry as it was, though the gradient is not within "
        "rounding: derivatives that are wrong or jump, or entries that differ by orders of magnitude (give minimize "
        "their scale)"
    )
    FLAT = (
        "within rounding the residuals do not depend on the variables here, and curvature tells no minimum: begin "
        "elsewhere, such as nearer to the data"
    )
    NON_FINITE = (
        "the function or its gradient is not finite at the last point (begin where they are, for instance with smaller "
        "exponents, or bound the variables; where squares leave the range of the dtype, divide what is squared by a "
        "constant, or use float64)"
    )
    UNBOUNDED = (
        "the function falls without bound: it has no minimum where the steps went (bound its variables, for instance "
        "with a penalty, or begin elsewhere)"
    )
    STOPPED = "the callback asked to stop"

    @property
    def message(self) -> str:
        """A sentence that explains the termination."""
        return self.value

    @property
    def success(self) -> bool:
        """Whether a minimum was reached."""
        return self.status == 0

    @property
    def status(self) -> int:
        """0 for success, 1 for the limit on iterations, 2 for no progress, 3 for nan, 4 for no bound, 99 for a stop."""
        return _STATUS.get(self, 0)


_STATUS = {
    Termination.MAX_ITERATIONS: 1,
    Termination.NO_PROGRESS: 2,
    Termination.FLAT: 2,
    Termination.NON_FINITE: 3,
    Termination.UNBOUNDED: 4,
    Termination.STOPPED: 99,
}


@dataclass(frozen=True)
class Tolerances:
    """What counts as a minimum: see :func:`minimize`. A test at 0 is off."""

    ftol: float
    xtol: float
    gtol: float
    tol: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                raise ValueError(f"{name} is at least 0, a finite number, got {value!r}. 0 switches the test off.")

    @classmethod
    def chosen(
        cls, dtype: torch.dtype, tol: float | None, ftol: float | None, xtol: float | None, gtol: float | None
    ) -> Tolerances:
        """Those given; of the others none beside ``tol``, else what the dtype allows."""
        near = torch.finfo(dtype).eps ** (2 / 3) if tol is None else 0.0
        defaults = {"ftol": near**2, "xtol": near, "gtol": near, "tol": 0.0}
        given = {"ftol": ftol, "xtol": xtol, "gtol": gtol, "tol": tol}
        return cls(**{name: defaults[name] if value is None else value for name, value in given.items()})


@dataclass
class Course:
    """How a run has gone so far, for the tests that need more than a point.

    Attributes:
        tolerances: what counts as a minimum.
        unit_roundoff: of the function's dtype.
        largest: the largest |x_i| met, (n,).
        by_residuals: whether steps see of the curvature what residuals show; where they crawl, Newton's may do better.
        record: of the last step.
    """

    tolerances: Tolerances
    unit_roundoff: float
    largest: Tensor
    by_residuals: bool = False
    record: StepRecord | None = None
    _steps: list[float] = field(default_factory=list)
    _wait: int = 0
    _next_wait: int = 1
    _near: float = math.inf
    _seen: bool = False
    _crawling: int = 0
    _highest: float = 0.0
    _scale: float = 0.0

    def went(self, before: Tensor, after: Tensor, record: StepRecord) -> None:
        """Take in a step."""
        self.record, self.largest = record, torch.maximum(self.largest, after.abs())
        self._steps.append(float((after - before).norm()) if record.accepted else 0.0)
        self._highest = max(self._highest, abs(record.loss))
        self._scale = self._scale or max(abs(record.loss), record.loss - record.new_loss)
        self._wait -= 1
        self._seen = self._seen and torch.equal(before, after)
        crawls = record.accepted and abs(record.loss - record.new_loss) <= CRAWL * abs(record.new_loss)
        self._crawling = self._crawling + 1 if crawls else 0
        # What the model promised, beside the function; a step that moved nothing promises nothing.
        self._near = record.predicted_decrease / abs(record.new_loss) if record.new_loss else math.inf

    @property
    def slow(self) -> bool:
        """Whether the last steps contracted slowly but surely, as Newton's do where curvature vanishes."""
        last = self._steps[-RUN - 1 :]
        return len(last) > RUN and all(SLOW * a < b < a for a, b in itertools.pairwise(last))

    @property
    def unbounded(self) -> bool:
        """Whether f has fallen below -1/ε² times its first value or decrease, or where its square overflows."""
        assert self.record is not None
        lowest = min(self._scale / self.unit_roundoff**2, math.sqrt(torch.finfo(self.largest.dtype).max))
        return self.record.new_loss < -lowest

    @property
    def crawls(self) -> bool:
        """Whether the last steps have lowered the loss by little each, and Newton's may do better."""
        return self.by_residuals and self._crawling >= RUN

    @property
    def typical(self) -> Tensor | None:
        """Sizes of entries where their own say nothing, since they shrink at the pace of the steps."""
        return self.largest if self.slow else None

    def worth_a_look(self, x: Tensor) -> bool:
        """Whether the last step makes a minimum likely; looks that were in vain become rarer."""
        assert self.record is not None
        tolerances, step = self.tolerances, self._steps[-1]
        size = float((self.largest if self.slow else x).norm())
        likely = (
            not self.record.accepted
            or self.record.gradient_norm <= tolerances.tol
            or step <= math.sqrt(tolerances.xtol) * size
            or self._near <= max(tolerances.gtol, tolerances.ftol)
            or self.crawls
        )
        return likely and not self._seen and (self._wait <= 0 or not self.record.accepted)

    def in_vain(self) -> None:
        """A look has shown that the point is no minimum."""
        self._seen, self._wait, self._next_wait = True, self._next_wait, 2 * self._next_wait

    def verdict(self, loss: float, found: Stationarity, stalled: bool = False) -> Termination | None:
        """Which test a point passes, curvature apart; None for none.

        Args:
            loss: f there.
            found: measured there.
            stalled: whether steps have ended to make progress, so that what is left to gain may be rounding.
        """
        t, size = self.tolerances, abs(loss)
        if found.gradient_norm <= t.tol:
            return Termination.CONVERGED if t.tol else Termination.GRADIENT
        if self.by_residuals and found.hidden and self._falls():
            return None
        if found.at_rounding:
            return Termination.PRECISION
        if found.decrease <= t.gtol**2 * size:
            return Termination.GRADIENT
        if found.step <= t.xtol:
            return Termination.STEP
        if found.decrease <= t.ftol * size and self._lowered_little():
            return Termination.DECREASE
        near = found.decrease <= 10 * self.unit_roundoff * size
        near = near or found.step <= math.sqrt(self.unit_roundoff)
        # Where f itself is rounded away, as at the minimum of log cosh x, what it was on the way tells of its rounding.
        record = self.record
        mute = record is not None and not record.accepted and record.actual_decrease == 0
        near = near or (mute and found.decrease <= 10 * self.unit_roundoff * self._highest)
        return Termination.PRECISION if stalled and near else None

    def flat(self, loss: float, found: Stationarity) -> bool:
        """Whether moving x by its own size changes a fit by no more than rounding, where curvature tells no minimum."""
        return self.by_residuals and found.extent <= self.unit_roundoff * abs(loss) and loss != 0

    def _falls(self) -> bool:
        """Whether the last step has lowered the loss by much, so that what rounding hides of g may be a gradient."""
        record = self.record
        return record is not None and record.accepted and record.loss - record.new_loss > CRAWL * abs(record.new_loss)

    def _lowered_little(self) -> bool:
        """Whether the last step's decrease was within ftol, by the model and as far as rounding shows it."""
        if self.record is None:
            return False
        record, size = self.record, abs(self.record.new_loss)
        actual = record.loss - record.new_loss
        rounding = 10 * self.unit_roundoff
        return record.predicted_decrease <= self.tolerances.ftol * size and actual <= max(
            self.tolerances.ftol, rounding
        ) * size
