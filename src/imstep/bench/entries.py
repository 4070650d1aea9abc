"""What the bench trains: for each task how long, in which batches, what is measured and who takes part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache

from imstep.bench.sides import OWN, USUAL, Range, Side, own_side, side_of
from imstep.runs.rows import Limits, TrainingError
from imstep.runs.suitability import suited
from imstep.tasks import TaskError, get_task

__all__ = [
    "ACCURACY", "ENTRIES", "EXPLAINED", "HELDOUT", "PSNR", "TRAIN", "WRONG", "Entry", "Measure", "entries_of",
    "entry_of",
]  # fmt: skip


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
        decay: whether weight decay is tuned, for all.
        ours: `newton-krylov`, `least-squares` or `newton-krylov-batches`; None for what the task's structure says.
        sides: the peers.
        extra: further contestants, by the names that `imstep train -o` takes.
        ranges: by contestant, where the usual ranges do not fit.
        examples: train on the first so many.
        dtype: float32 or float64.
        gradient: seconds of a gradient on one thread, roughly; for estimates alone.
        sweep: the name of a table that sets this entry beside others of other batch sizes; "" for none.

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
    decay: bool = False
    ours: str | None = None
    sides: tuple[str, ...] = USUAL
    extra: tuple[str, ...] = ()
    ranges: Mapping[str, Mapping[str, Range]] = field(default_factory=dict)
    examples: int | None = None
    dtype: str = "float32"
    gradient: float = 0.01
    sweep: str = ""

    @property
    def label(self) -> str:
        """The entry's name."""
        return self.name or self.task

    @property
    def level(self) -> float | None:
        """The target as `Measure.value` would give it, so that less is better; None without one."""
        return None if self.target is None else self.measure.shown(self.target)

    @property
    def limits(self) -> Limits:
        """Of a run."""
        return Limits(budget=self.budget) if self.seconds is None else Limits(seconds=self.seconds)

    @property
    def trial_limits(self) -> Limits:
        """Of a trial: always by cost, so that tuning is the same on every machine."""
        return Limits(budget=self.trial or self.budget / 2)

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
        self, *, budget: float | None = None, seconds: float | None = None, sides: tuple[str, ...] | None = None
    ) -> Entry:
        """With limits or contestants of one's own in place of the entry's; trials shrink or grow alike.

        Raises:
            TrainingError: both limits, or one that is not above 0.
        """
        if budget is not None and seconds is not None:
            raise TrainingError("a run ends by --budget or by --seconds: give one of them.")
        for word, number in (("--budget", budget), ("--seconds", seconds)):
            if number is not None and not 0 < number < math.inf:
                raise TrainingError(f"{word} {number:g}: give a number above 0.")
        found = self
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


def entry_of(name: str) -> Entry:
    """The entry of that name; or the usual one of any task: the full batch, the training loss, no weight decay.

    Raises:
        TaskError: there is no such task.
    """
    if name in ENTRIES:
        return ENTRIES[name]
    get_task(name)
    return Entry(name)


def entries_of(name: str) -> list[Entry]:
    """The entry of that name, or those that a pattern such as `shakespeare-gpt-*` fits.

    Raises:
        TaskError: there is none.
    """
    if "*" not in name:
        return [entry_of(name)]
    found = [entry for label, entry in ENTRIES.items() if fnmatchcase(label, name)]
    if not found:
        raise TaskError(f"no entry of the bench fits {name!r}. `imstep bench --list` names them.")
    return found


_CONVECTION = {name: {"lr": Range(3e-4, 3e-2)} for name in ("soap", "kl-shampoo")}
_SYSTEMS = ("adamw", "soap", "lbfgs", "adam-lbfgs")
_RECURRENT = ("adam-clipped", "adam-orthogonal", "soap", "kfac", "hessian-free", "lstm-adam")
_STATES = Range(0.1, 10.0)
"""Weights of the damping of hidden states, for our side: it has as many trials as the others."""
_SWEEP = ("adamw", "muon", "soap")


def _recurrent(task: str, gradient: float, batch_size: int | None = 100) -> Entry:
    """1,000 sequences an epoch, drawn anew; that of 32 known ones by the full batch."""
    return Entry(
        task, budget=600, trial=150, batch_size=batch_size, measure=WRONG, target=0.01, sides=_RECURRENT,
        ranges={OWN: {"structural": _STATES}}, gradient=gradient,
    )  # fmt: skip


def _table(task: str, gradient: float) -> Entry:
    """Judged by what is held out."""
    others = ("sklearn-mlp", "sklearn-boosting")
    return Entry(task, budget=500, measure=EXPLAINED, decay=True, extra=others, gradient=gradient)


def _sweep(task: str, sizes: tuple[int, ...], target: float, gradient: float, epochs: float) -> list[Entry]:
    """A task by batches of many sizes, to one loss; all sizes see as many examples for each gradient-equivalent."""
    return [
        Entry(
            task, f"{task}-{size}", budget=epochs, trial=epochs / 2, batch_size=size, measure=HELDOUT, target=target,
            sides=_SWEEP, gradient=gradient, sweep=task,
        )
        for size in sizes
    ]  # fmt: skip


_ALL = (
    Entry("digits-autoencoder", budget=600, gradient=0.006),
    Entry("fashion-autoencoder", budget=1500, trial=600, examples=2000, gradient=0.045),
    Entry(
        "fashion-autoencoder", "fashion-autoencoder-batches", seconds=60, trial=40, batch_size=512, examples=20_000,
        measure=HELDOUT, decay=True, gradient=0.4,
    ),
    Entry(
        "digits-mlp", seconds=15, trial=200, batch_size=128, measure=ACCURACY, decay=True, gradient=0.006,
    ),
    Entry(
        "digits-cnn", seconds=30, trial=200, batch_size=512, measure=ACCURACY, decay=True, gradient=0.012,
    ),
    Entry("convection-sobol", budget=2000, ours="least-squares", ranges=_CONVECTION, target=1e-4, gradient=0.012),
    Entry("poisson-2d", budget=1000, target=1e-6, gradient=0.01),
    Entry("burgers", budget=1000, target=1e-5, gradient=0.02),
    Entry("wave", budget=2000, target=1e-4, gradient=0.02),
    Entry("curves-autoencoder", budget=100, batch_size=2000, gradient=2.5),
    Entry("curves-autoencoder", "curves-autoencoder-full", budget=200, trial=50, examples=5000, gradient=0.6),
    *(_recurrent(task, 0.3) for task in ("addition-80", "multiplication-80", "temporal-order-80", "memory-20bit-80")),
    *(_recurrent(task, 0.6) for task in ("addition-150", "multiplication-150")),
    _recurrent("memory-5bit-200", 0.06, None),
    Entry(
        "silverbox", budget=1500, trial=500, ours="least-squares", target=1.1e-4, dtype="float64", sides=_SYSTEMS,
        gradient=0.06,
    ),
    Entry(
        "wiener-hammerstein", budget=1500, trial=500, ours="least-squares", target=1.5e-4, dtype="float64",
        sides=_SYSTEMS, gradient=0.045,
    ),
    Entry("picture-sines", seconds=120, trial=150, measure=PSNR, gradient=0.2),
    Entry("picture-fourier", seconds=120, trial=150, measure=PSNR, gradient=0.2),
    Entry(
        "modular-addition-97", budget=3000, trial=1500, measure=ACCURACY, target=0.99, decay=True, sides=_SWEEP,
        gradient=0.25,
    ),
    *_sweep("shakespeare-gpt", (16, 64, 256, 1024, 4096), 1.9, 40.0, 8),
    *_sweep("shakespeare-small", (16, 128, 1024), 2.4, 1.2, 12),
    Entry("fashion-resnet8", seconds=300, trial=1, batch_size=128, measure=ACCURACY, decay=True, gradient=120.0),
    Entry("fashion-resnet20", seconds=600, trial=1, batch_size=128, measure=ACCURACY, decay=True, gradient=400.0),
    Entry("fashion-mixer", seconds=200, trial=2, batch_size=128, measure=ACCURACY, decay=True, gradient=120.0),
    _table("census-house", 0.02),
    _table("kin32fm", 0.004),
    _table("abalone", 0.004),
    Entry("moons-flow", budget=1000, trial=300, gradient=0.011),
    Entry("gaussian-process", budget=500, trial=200, gradient=0.04),
    Entry("butane-forces", budget=1000, trial=300, gradient=0.006),
)  # fmt: skip
ENTRIES: dict[str, Entry] = {entry.label: entry for entry in _ALL}
"""The entries of the bench by name."""
