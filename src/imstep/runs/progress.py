"""Live progress of a training run on a terminal, in one line; plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.text import Text

from imstep.runs.rows import EvaluationRow, Limits, LogRow, StepRow
from imstep.runs.runner import Trainer
from imstep.runs.verdict import short

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Drawn", "LastStep", "TrainingProgress", "clock", "fitting"]

LINE_INTERVAL = 5.0
"""Seconds between lines when there is no terminal to redraw."""
BAR = 12


class Drawn:
    """Something that is redrawn in place while work goes on, on a terminal only; a context manager.

    Args:
        console: where to draw.
        live: what is drawn.
    """

    def __init__(self, console: Console, live: Live | Progress) -> None:
        self._console, self._drawn = console, live

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._drawn.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._drawn.stop()

    def announce(self, note: str) -> None:
        """Print a line above it, for example that a step is being finished."""
        self._console.print(note, highlight=False)


class TrainingProgress(Drawn):
    """An observer that shows in one line how far a run is, its losses and the time left.

    Args:
        console: where to draw.
        title: what is being trained.
        limits: of the run; the line shows the one that is nearest.
    """

    def __init__(self, console: Console, title: str, limits: Limits) -> None:
        self._live = Live(Text(title), console=console, refresh_per_second=8, transient=True)
        super().__init__(console, self._live)
        self._limits = limits
        self._start: tuple[float, float] | None = None
        self._heldout: EvaluationRow | None = None
        self._loss: float | None = None
        self._printed = 0.0

    def __call__(self, trainer: Trainer, row: LogRow) -> None:
        if isinstance(row, EvaluationRow):
            self._heldout = row
            self._loss = row.train_loss
        elif isinstance(row, StepRow):
            self._loss = row.loss if row.new_loss is None else row.new_loss
        (done, words), now = self._nearest(trainer), time.monotonic()
        if self._start is None:
            self._start = (now, done)
        parts = [f"{100 * done:3.0f} %", words, *self._reached(trainer, now, done)]
        if self._console.is_terminal:
            full = round(BAR * done)
            bar = f"[cyan]{'━' * full}[/][dim]{'━' * (BAR - full)}[/]"
            self._live.update(Text.from_markup(bar).append(" " + fitting(parts, self._console.width - BAR - 2)))
        elif now - self._printed > LINE_INTERVAL:
            self._printed = now
            self._console.print("  ".join(parts), soft_wrap=True, highlight=False)

    def _nearest(self, trainer: Trainer) -> tuple[float, str]:
        """How near the nearest limit is, 0 to 1, and how much of it is used in words."""
        used = (
            (trainer.epoch, self._limits.epochs, "epochs"),
            (trainer.totals.cost, self._limits.budget, "gradient-eq."),
            (trainer.totals.seconds, self._limits.seconds, "s"),
        )
        shares = [(value / limit, f"{value:.0f}/{limit:g} {unit}") for value, limit, unit in used if limit is not None]
        share, words = max(shares)
        return min(1.0, share), words

    def _remaining(self, now: float, done: float) -> str:
        start, before = self._start or (now, done)
        return f"{clock((now - start) * (1 - done) / (done - before))} left" if done > before else "time left: -:--"

    def _reached(self, trainer: Trainer, now: float, done: float) -> list[str]:
        """The most important first: what does not fit is left out."""
        parts = [] if self._loss is None else [f"loss {short(self._loss)}"]
        parts.append(self._remaining(now, done))
        if self._heldout is not None:
            parts.append(f"held-out {short(self._heldout.heldout_loss)}")
            metric = trainer.problem.metric
            if metric is not None and self._heldout.heldout_metric is not None:
                parts.append(f"{metric.name} {self._heldout.heldout_metric:.4g}")
        return parts


class LastStep:
    """An observer that remembers the last step and the last evaluation, for a run that does not reach its end."""

    def __init__(self) -> None:
        self._step: StepRow | None = None
        self._evaluation: EvaluationRow | None = None

    def __call__(self, trainer: Trainer, row: LogRow) -> None:
        if isinstance(row, EvaluationRow):
            self._evaluation = row
        elif isinstance(row, StepRow):
            self._step = row

    def describe(self) -> str:
        """What the last step did, in words."""
        step, evaluation = self._step, self._evaluation
        if step is None:
            return "No step was made"
        after = "" if step.new_loss is None else f", {short(step.new_loss, 3)} after it"
        ended = "" if step.status is None else f", ended by {step.status.replace('_', ' ')}"
        words = f"step {step.step:,} (epoch {step.epoch:.4g}): loss {short(step.loss, 3)}{after}{ended}"
        if evaluation is not None:
            words += f"; last evaluation at step {evaluation.step:,}: held-out loss {short(evaluation.heldout_loss, 3)}"
        return words


def clock(seconds: float) -> str:
    """Seconds as people read them.

    >>> clock(7.4), clock(83), clock(3723)
    ('0:07', '1:23', '1:02:03')
    """
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts, from the first on, as one line holds.

    >>> fitting(["loss 1.0", "0:12 left", "held-out 2.0"], 20)
    'loss 1.0  0:12 left'
    """
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line
