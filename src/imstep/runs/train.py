"""A training run with its files: step, log, save now and then, stop when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from imstep.runs.interrupt import Interrupt
from imstep.runs.rows import LogRow, Row, StepRow
from imstep.runs.rundir import RunDirectory
from imstep.runs.runner import Trainer
from imstep.runs.watch import CurvatureWatch

__all__ = ["Observer", "train"]

Observer = Callable[[Trainer, LogRow], None]


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
        interrupt: checked between rows; of several processes one that is interrupted stops all.
        save_every: seconds between checkpoints (> 0).
        watch: measures the curvature now and then; its rows go where the others go.
    """
    groups = _measured(trainer, trainer.run(run.config.limits), watch)
    ahead = list(_to_first_step(groups))
    run.begin()
    for group in ahead:
        _note(trainer, run, observers, group)
    run.save(trainer)
    saved = time.monotonic()
    while not trainer.peers.any(interrupt is not None and interrupt.requested):
        group = next(groups, ())
        if not group:
            break
        _note(trainer, run, observers, group)
        if time.monotonic() - saved > save_every:
            run.save(trainer)
            saved = time.monotonic()
    run.save(trainer)
    run.write_report(trainer)


Group = tuple[LogRow, ...]
"""A row, and the measurement that is due after it; no checkpoint is written between the two."""


def _measured(trainer: Trainer, rows: Iterator[Row], watch: CurvatureWatch | None) -> Iterator[Group]:
    """Each row as it is made, before the next step is taken."""
    for row in rows:
        measurement = None if watch is None else watch(trainer, row)
        yield (row,) if measurement is None else (row, measurement)


def _to_first_step(groups: Iterator[Group]) -> Iterator[Group]:
    for group in groups:
        yield group
        if isinstance(group[0], StepRow):
            return


def _note(trainer: Trainer, run: RunDirectory, observers: Sequence[Observer], group: Group) -> None:
    for row in group:
        run.append(row)
        for observe in observers:
            observe(trainer, row)
