"""Live progress of a training run on a terminal; plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from imstep.runs.rows import EvaluationRow, Limits, Row
from imstep.runs.runner import Trainer

__all__ = ["TrainingProgress"]

LINE_INTERVAL = 5.0
"""Seconds between lines when there is no terminal to redraw."""


class TrainingProgress:
    """An observer that shows loss, held-out loss, epochs, gradient-equivalents and the time left.

    Args:
        console: where to draw.
        title: what is being trained.
        limits: of the run; the bar shows the one that is nearest.
    """

    def __init__(self, console: Console, title: str, limits: Limits) -> None:
        self._console = console
        self._limits = limits
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            console=console,
        )
        self._task = self._bar.add_task(title, total=1.0, eta="-:--:--")
        self._live = Live(self._bar, console=console, refresh_per_second=8, transient=True)
        self._start: tuple[float, float] | None = None
        self._heldout: EvaluationRow | None = None
        self._loss: float | None = None
        self._printed = 0.0
        self._note = ""

    def __enter__(self) -> TrainingProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def announce(self, note: str) -> None:
        """Show a line until the run ends, for example that a step is being finished."""
        self._note = note
        if not self._console.is_terminal:
            self._console.print(note)

    def __call__(self, trainer: Trainer, row: Row) -> None:
        if isinstance(row, EvaluationRow):
            self._heldout = row
            self._loss = row.train_loss
        else:
            self._loss = row.loss if row.new_loss is None else row.new_loss
        done, now = self._fraction(trainer), time.monotonic()
        if self._start is None:
            self._start = (now, done)
        reached, used = self._reached(trainer), self._used(trainer)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, eta=self._remaining(now, done))
            self._live.update(Group(self._bar, Text(reached), Text(used), Text(self._note, style="yellow")))
        elif now - self._printed > LINE_INTERVAL:
            self._printed = now
            line = f"{100 * done:3.0f} %  {reached}  {used}  eta {self._remaining(now, done)}"
            self._console.print(line, soft_wrap=True, highlight=False)

    def _fraction(self, trainer: Trainer) -> float:
        """How near the nearest limit is, 0 to 1."""
        used = {
            self._limits.epochs: trainer.epoch,
            self._limits.budget: trainer.totals.cost,
            self._limits.seconds: trainer.totals.seconds,
        }
        return min(1.0, max(value / limit for limit, value in used.items() if limit is not None))

    def _remaining(self, now: float, done: float) -> str:
        start, before = self._start or (now, done)
        if done <= before:
            return "-:--:--"
        seconds = round((now - start) * (1 - done) / (done - before))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _used(self, trainer: Trainer) -> str:
        epoch, cost = _of(trainer.epoch, self._limits.epochs), _of(trainer.totals.cost, self._limits.budget)
        return f"epoch {epoch}  step {trainer.totals.steps}  gradient-equivalents {cost}"

    def _reached(self, trainer: Trainer) -> str:
        parts = []
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4e}")
        if self._heldout is not None:
            parts.append(f"held-out {self._heldout.heldout_loss:.4e}")
            metric = trainer.problem.metric
            if metric is not None and self._heldout.heldout_metric is not None:
                parts.append(f"{metric.name} {self._heldout.heldout_metric:.3f}")
        return "  ".join(parts)


def _of(value: float, limit: float | None) -> str:
    return f"{value:.1f}" if limit is None else f"{value:.1f}/{limit:g}"
