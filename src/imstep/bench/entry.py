"""What a task of the bench is: how long it is trained, in which batches, what is measured and who takes part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from imstep.bench.sides import USUAL, Range, Side, own_side, side_of
from imstep.runs.rows import Limits, TrainingError
from imstep.runs.seconds import Seconds
from imstep.runs.suitability import suited
from imstep.tasks import get_task

__all__ = ["ACCURACY", "EXPLAINED", "HELDOUT", "PSNR", "TRAIN", "WRONG", "Entry", "Measure"]


@dataclass(frozen=True)
class Measure:
    """What a task is judged by.

    Args:
        column: of a curve: train, heldout, train_metric or heldout_metric.
        title: for tables.
        larger: whether more is better.
    """

    column: str
    title: str
    larger: bool = False

    def value(self, point: Mapping[str, float | None]) -> float:
        """The figure at a point of a curve so that less is better; infinity where there is none."""
        value = point[self.column]
        if value is None or not math.isfinite(value):
            return math.inf
        return -value if self.larger else value

    def shown(self, value: float) -> float:
        """What was measured, of such a figure."""
        return -value if self.larger else value


TRAIN = Measure("train", "training loss")
HELDOUT = Measure("heldout", "held-out loss")
ACCURACY = Measure("heldout_metric", "held-out accuracy", larger=True)
PSNR = Measure("heldout_metric", "held-out PSNR", larger=True)
EXPLAINED = Measure("heldout_metric", "held-out explained variance", larger=True)
WRONG = Measure("heldout_metric", "wrong answers")


@dataclass(frozen=True)
class Entry:
    """A task of the bench; but for the task's name everything has a default.

    Args:
        task: a task of `imstep tasks`, or a file of one's own.
        name: of the entry, where a task has several; the task's otherwise.
        budget: gradient-equivalents of a run.
        seconds: of a run, in place of `budget`.
        trial: gradient-equivalents of a trial in tuning; half of `budget` by default.
        batch_size: examples a step; None for the full batch. With mini-batches all are evaluated at averages.
        measure: what tuning chooses by and tables read.
        target: of the measure, that counts as solved; None for the best that both our side and a peer reach.
        until_solved: whether a run or trial of anybody ends where it reaches the target, having nothing more to show.
        decay: whether weight decay is tuned, for all.
        ours: `newton-krylov`, `least-squares` or `newton-krylov-batches`; None for what the task's structure says.
        sides: the peers.
        extra: further contestants, by the names that `imstep train -o` takes.
        ranges: by contestant, where the usual ranges do not fit.
        examples: train on the first so many.
        dtype: float32 or float64.
        gradient: seconds of a gradient on one thread, roughly; for estimates alone.
        looks: how often losses and measures are evaluated in a run; a fifth as often in a trial.
        sweep: the name of a table that sets this entry beside others of other batch sizes; "" for none.
        clock: of runs.

    Example:
        >>> Entry("digits-mlp", batch_size=128, measure=ACCURACY, decay=True, seconds=20, trial=30).label
        'digits-mlp'
    """

    task: str
    name: str = ""
    budget: float = 1000.0
    seconds: float | None = None
    trial: float | None = None
    batch_size: int | None = None
    measure: Measure = TRAIN
    target: float | None = None
    until_solved: bool = False
    decay: bool = False
    ours: str | None = None
    sides: tuple[str, ...] = USUAL
    extra: tuple[str, ...] = ()
    ranges: Mapping[str, Mapping[str, Range]] = field(default_factory=dict)
    examples: int | None = None
    dtype: str = "float32"
    gradient: float = 0.01
    looks: int = 60
    sweep: str = ""
    clock: Seconds = Seconds.PROCESSOR

    @property
    def label(self) -> str:
        """The entry's name."""
        return self.name or self.task

    @property
    def level(self) -> float | None:
        """The target as `Measure.value` would give it, so that less is better; None without one."""
        return None if self.target is None else self.measure.shown(self.target)

    @property
    def ending(self) -> float:
        """The figure, less being better, at which a run ends; minus infinity for none."""
        return self.level if self.until_solved and self.level is not None else -math.inf

    @property
    def limits(self) -> Limits:
        """Of a run."""
        return Limits(budget=self.budget) if self.seconds is None else Limits(seconds=self.seconds)

    @property
    def trial_limits(self) -> Limits:
        """Of a trial: always by cost, so that tuning is the same on every machine."""
        return Limits(budget=self.trial or self.budget / 2)

    def looks_of(self, trial: bool) -> int:
        """How often a run or a trial is evaluated after its beginning."""
        return max(2, self.looks // 5) if trial else self.looks

    def contestants(self) -> list[Side]:
        """Our side first."""
        named = self.ours or (_suits(self.task) if self.batch_size is None else "newton-krylov-batches")
        peers = [side_of(name) for name in (*self.sides, *self.extra)]
        return [own_side(named), *(p for p in peers if p.batches is None or p.batches == (self.batch_size is not None))]

    def ranges_of(self, side: Side) -> dict[str, Range]:
        """What a contestant is tuned over here; empty for no tuning."""
        found = {**side.ranges, **self.ranges.get(side.name, {})}
        takes_decay = self.decay and "weight_decay" in side.spec.defaults
        return {**found, "weight_decay": side.decay} if takes_decay else found

    def asked(
        self,
        *,
        budget: float | None = None,
        seconds: float | None = None,
        sides: tuple[str, ...] | None = None,
        clock: Seconds = Seconds.PROCESSOR,
    ) -> Entry:
        """With limits, contestants or a clock of one's own in place of the entry's; trials shrink or grow alike.

        Raises:
            TrainingError: both limits, or one that is not above 0.
        """
        if budget is not None and seconds is not None:
            raise TrainingError("a run ends by --budget or by --seconds: give one of them.")
        for word, number in (("--budget", budget), ("--seconds", seconds)):
            if number is not None and not 0 < number < math.inf:
                raise TrainingError(f"{word} {number:g}: give a number above 0.")
        found = replace(self, clock=clock)
        if budget is not None:
            found = replace(found, budget=budget, seconds=None, trial=None)
        if seconds is not None:
            share = 1.0 if self.seconds is None else seconds / self.seconds
            found = replace(found, seconds=seconds, trial=share * (self.trial or self.budget / 2))
        return found if sides is None else replace(found, sides=sides, extra=())


@cache
def _suits(task: str) -> str:
    """Our configuration for the full batch, by the task's structure; a table is not read again for it."""
    return suited(get_task(task))[0]
