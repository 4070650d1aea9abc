"""What a call of a benchmark makes: tuning and runs that the records lack, each kept at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.strength.peers import missing
from benchmarks.strength.record import add, load
from benchmarks.strength.run import limit, limits_of, run_side, trial_limits, tune
from benchmarks.strength.sides import Options, Side
from benchmarks.strength.tasks import TUNING_SEED, StrengthTask
from imstep.runs.progress import TrainingProgress
from imstep.runs.rows import Limits
from imstep.runs.seconds import Seconds
from imstep.tasks import DataNotFoundError

QUICK = 0.01
"""What a smoke test has of every limit."""


@dataclass(frozen=True)
class Session:
    """What all runs of one call share."""

    console: Console
    records: Path
    data: Path | None
    scale: float
    clock: Seconds = Seconds.WALL

    def tuned(self, task: StrengthTask, side: Side) -> Options:
        """The side's setting, tuned now if that was not done yet."""
        if len(trials := side.trials_on(task.name)) == 1:
            return trials[0]
        limits, record = trial_limits(task, side, self.scale), load(self.records, task.name)
        sweep = record.sweep(side, task.name, *limit(limits).values())
        if sweep is None:
            with self._progress(f"{task.name}, {side.name}, tuning", limits) as progress:
                sweep = tune(task, side, self.scale, self.data, progress, self.clock)
            add(self.records, task.name, sweep, self.clock)
            tried = ", ".join(f"{row.options} {row.loss:.3g}" for row in sweep.rows)
            self.console.print(f"{task.name}, {side.name}: tuned on seed {TUNING_SEED}: {tried}", highlight=False)
        return sweep.chosen.options

    def run(self, task: StrengthTask, side: Side, seed: int) -> None:
        """Make the run unless the record has it."""
        limits, options = limits_of(task, side, self.scale), self.tuned(task, side)
        record = load(self.records, task.name)
        if record.run(side.name, seed, options, limit(limits)) is not None:
            return
        with self._progress(f"{task.name}, {side.name}, seed {seed}", limits) as progress:
            run = run_side(task, side, options, seed, limits, self.data, progress, clock=self.clock)
        add(self.records, task.name, run, self.clock)
        end = run.curve[-1]
        self.console.print(
            f"{task.name}, {side.name}, seed {seed}: train {end.train:.3e}, held-out {end.heldout:.3e}, "
            f"{end.cost:.0f} gradient-equivalents, {end.seconds:.0f} s",
            highlight=False,
        )

    def _progress(self, title: str, limits: Limits) -> TrainingProgress:
        return TrainingProgress(self.console, title, limits)


def run_all(
    session: Session, task: StrengthTask, sides_by_name: Mapping[str, Side], names: Sequence[str], seeds: Sequence[int]
) -> None:
    """Tune and run the sides of a task, or those of them that are named, unless the record has it."""
    sides = [sides_by_name[name] for name in task.sides if not names or name in names]
    absent = {side.name: missing(side.spec) for side in sides}
    for line in filter(None, dict.fromkeys(absent.values())):
        session.console.print(f"[yellow]left out:[/] {line}")
    sides = [side for side in sides if not absent[side.name]]
    try:
        for side in sides:
            session.tuned(task, side)
        # Seeds outside, so that the sides of one seed meet the machine in the same mood.
        for seed in seeds:
            for side in sides:
                session.run(task, side, seed)
    except DataNotFoundError as error:
        session.console.print(f"[yellow]left out:[/] {task.name}: {error}")
