"""One run: a side trains a task from one seed; what is kept of it is its curve."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.strength.peers import PACKAGE
from benchmarks.strength.sides import Options, Side
from benchmarks.strength.tasks import TUNING_SEED, StrengthTask, Surface
from imstep.runs.environment import environment
from imstep.runs.records import Point, Sweep, SweepRow
from imstep.runs.rows import EvaluationRow, Limits, Row
from imstep.runs.runner import Trainer
from imstep.runs.seconds import Seconds

KEPT_POINTS = 60
DIGITS = 5
TRIAL_LOOKS = 10

Observer = Callable[[Trainer, Row], None]
"""Is told each row of a run; draws it, or does not."""


@dataclass(frozen=True)
class StrengthRun:
    """What is kept of a run.

    Args:
        side: name of the side.
        seed: of initial weights and batches.
        options: of the optimizer.
        limit: what ended the run: its name and value.
        ending: why the run ended.
        curve: losses over all data at about sixty points, with all points where something is read.
        products: curvature products.
        statuses: how steps ended, name -> count.
        about: date, commit, versions, machine, its load.
        error: of the solution on a grid, row by row, where the task wants it kept.
    """

    side: str
    seed: int
    options: dict[str, float]
    limit: dict[str, float]
    ending: str
    curve: tuple[Point, ...]
    products: int
    statuses: dict[str, int]
    about: dict[str, str]
    error: Surface | None = None

    def best_at(self, clock: str, mark: float) -> Point:
        """The point of the lowest training loss up to `mark` on the clock "cost" or "seconds"."""
        inside = [p for p in self.curve if getattr(p, clock) <= mark] or [self.curve[0]]
        return min(inside, key=lambda p: p.train if p.train == p.train else float("inf"))

    def last_at(self, clock: str, mark: float) -> Point:
        """The last point up to `mark`."""
        return [p for p in self.curve if getattr(p, clock) <= mark or p is self.curve[0]][-1]

    def first_below(self, loss: float) -> Point | None:
        """The first point whose training loss is at most `loss`, or None."""
        return next((p for p in self.curve if p.train <= loss), None)


def limits_of(task: StrengthTask, side: Side, scale: float) -> Limits:
    """The limits of a recorded run, shortened by `scale` for a smoke test."""
    return _scaled(task.limits_of(side.name), scale)


def trial_limits(task: StrengthTask, side: Side, scale: float) -> Limits:
    """The limits of a trial, shortened likewise."""
    return _scaled(task.trial_of(side.name), scale)


def _scaled(limits: Limits, scale: float) -> Limits:
    return Limits(**{name: value * scale for name, value in limit(limits).items()})


def limit(limits: Limits) -> dict[str, float]:
    """The limits that there are, by name."""
    return {name: value for name, value in asdict(limits).items() if value is not None}


def run_side(
    task: StrengthTask,
    side: Side,
    options: Options,
    seed: int,
    limits: Limits,
    data: Path | None,
    observe: Observer,
    looks: int | None = None,
    clock: Seconds = Seconds.WALL,
) -> StrengthRun:
    """Train until a limit; the learning rate follows the side's schedule. Evaluates `looks` times, or as the task says.

    Raises:
        DataNotFoundError: the data set is not installed.
    """
    about = describe()
    problem = task.build(seed, data)
    stepper = side.spec.create(problem, **options)
    schedule = task.schedule_of(limits, looks or task.looks)
    trainer = Trainer(problem, stepper, batch_size=task.batch_size, seed=seed, schedule=schedule, seconds=clock)
    groups = [(group, group.get("lr", 0.0)) for group in stepper.optimizer.param_groups]
    points = []
    try:
        for row in trainer.run(limits):
            observe(trainer, row)
            if isinstance(row, EvaluationRow):
                points.append(Point(row.cost, row.seconds, row.step, row.epoch, row.train_loss, row.heldout_loss))
                continue
            for group, rate in groups:
                if "lr" in group:
                    group["lr"] = rate * side.schedule(_done(trainer, limits))
        ending = trainer.ending.message if trainer.ending else ""
    except (ArithmeticError, RuntimeError) as error:  # a side that fails within its run has a result, too
        ending = f"failed: {type(error).__name__}: {error}".split("\n")[0]
    totals = trainer.totals
    return StrengthRun(
        side=side.name,
        seed=seed,
        options=dict(options),
        limit=limit(limits),
        ending=ending,
        curve=thinned(points, task),
        products=totals.products,
        statuses=dict(totals.statuses),
        about=about,
        error=task.error_of(problem, side.name, seed),
    )


def tune(
    task: StrengthTask,
    side: Side,
    scale: float,
    data: Path | None,
    observe: Observer,
    clock: Seconds = Seconds.WALL,
) -> Sweep:
    """Try the side's settings on a seed of their own."""
    limits, rows = trial_limits(task, side, scale), []
    for options in side.trials_on(task.name):
        run = run_side(task, side, options, TUNING_SEED, limits, data, observe, TRIAL_LOOKS, clock)
        best = run.best_at("cost", float("inf"))
        rows.append(SweepRow(dict(options), _rounded(best.train), _rounded(run.curve[-1].seconds), run.ending))
    return Sweep(side.name, *limit(limits).values(), tuple(rows))


def _done(trainer: Trainer, limits: Limits) -> float:
    """How much of the run is done, 0 to 1."""
    if limits.seconds is not None:
        return trainer.totals.seconds / limits.seconds
    return trainer.totals.cost / (limits.budget or 1.0)


def thinned(points: Sequence[Point], task: StrengthTask) -> tuple[Point, ...]:
    """About sixty points, and all where something will be read: around marks, and where levels are reached."""
    run = StrengthRun("", 0, {}, {}, "", tuple(points), 0, {}, {})
    kept = {round(i * (len(points) - 1) / (KEPT_POINTS - 1)) for i in range(KEPT_POINTS)}
    read = [*task.reads(run), run.best_at("cost", float("inf"))]
    chosen = [p for i, p in enumerate(points) if i in kept or any(p is r for r in read)]
    return tuple(Point(**{k: _rounded(v) for k, v in asdict(p).items()}) for p in chosen)


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def describe() -> dict[str, str]:
    """When, on what and of which version a run is made."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        **environment(),
        PACKAGE: _version(PACKAGE),
        "cores": str(os.cpu_count()),
        "load average": f"{os.getloadavg()[0]:.1f}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def _commit() -> str:
    """The commit of the working tree, with a plus sign if files of the library differ from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../../src"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changed else "")
