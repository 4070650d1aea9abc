"""A training run with its files: step, log, save now and then, stop when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from imstep.runs.interrupt import Interrupt
from imstep.runs.rows import Row, StepRow
from imstep.runs.rundir import RunDirectory
from imstep.runs.runner import Trainer
from imstep.runs.watch import CurvatureWatch

__all__ = ["Observer", "train"]

Observer = Callable[[Trainer, Row], None]


def train(
    trainer: Trainer,
    run: RunDirectory,
    *,
    observers: Sequence[Observer] = (),
    interrupt: Interrupt | None = None,
    save_every: float = 30.0,
    watch: CurvatureWatch | None = None,
) -> None:
    """Run `trainer` to the limits of the run's config, keeping the run directory up to date.

    The directory of a planned run is made once a step has been taken, so that what an optimizer refuses leaves none
    behind. A checkpoint is written then, every `save_every` seconds, at the end and on an interruption; when it is
    written never changes the numbers. Afterwards `trainer.ending` is None if the run was
    interrupted. If a step raises, the last checkpoint stays as it was.

    Args:
        trainer: fresh, or restored by `run.restore`.
        run: where rows and checkpoints go.
        observers: called with (trainer, row) after each row.
        interrupt: checked between rows.
        save_every: seconds between checkpoints (> 0).
        watch: measures the curvature now and then; its rows go where the others go.
    """
    rows = trainer.run(run.config.limits)
    ahead = list(_to_first_step(rows))
    run.begin()
    note = partial(_note, trainer, run, observers, watch)
    for row in ahead:
        note(row)
    run.save(trainer)
    saved = time.monotonic()
    while interrupt is None or not interrupt.requested:
        found = next(rows, None)
        if found is None:
            break
        note(found)
        if time.monotonic() - saved > save_every:
            run.save(trainer)
            saved = time.monotonic()
    run.save(trainer)
    run.write_report(trainer)


def _to_first_step(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        yield row
        if isinstance(row, StepRow):
            return


def _note(
    trainer: Trainer, run: RunDirectory, observers: Sequence[Observer], watch: CurvatureWatch | None, row: Row
) -> None:
    """Write and show a row, and the measurement that is due after it."""
    measured = None if watch is None else watch(trainer, row)
    for each in (row,) if measured is None else (row, measured):
        run.append(each)
        for observe in observers:
            observe(trainer, each)
