"""Live progress of a comparison on a terminal: one bar for every optimizer; plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from imstep.runs.progress import Drawn, clock, fitting
from imstep.runs.records import Comparison, Run
from imstep.runs.verdict import short

__all__ = ["ComparisonProgress", "endings", "result_table"]


class ComparisonProgress(Drawn):
    """A listener for `compare` that draws a line for each optimizer; use it as a context manager.

    Args:
        console: where to draw; without a terminal, one line per finished setting and optimizer is printed.
    """

    def __init__(self, console: Console) -> None:
        self._bar = 4 if console.width < 80 else 8
        self._bars = Progress(
            TextColumn("{task.fields[name]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=self._bar),
            TextColumn("{task.fields[words]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            refresh_per_second=8,
        )
        super().__init__(console, self._bars)
        self._tasks: list[TaskID] = []
        self._names: list[str] = []
        self._settings: list[int] = []
        self._budget = 0.0
        self._number, self._setting, self._began = 0, "", 0.0
        self._best: float | None = None

    def begin(self, names: Sequence[str], settings: Sequence[int], budget: float) -> None:
        self._names, self._settings, self._budget = list(names), list(settings), budget
        waiting = [f"waiting: {n} learning rates, {budget:g} each" if n > 1 else "waiting" for n in settings]
        self._tasks = [
            self._bars.add_task("", total=budget * count, name=name, words=words)
            for name, count, words in zip(names, settings, waiting, strict=True)
        ]

    def candidate(self, index: int, number: int, words: str) -> None:
        if number == 0 or self._best is None:
            self._best, self._began = None, time.monotonic()
        self._number = number
        self._setting = f"{words} ({number + 1} of {self._settings[index]})" if words else ""
        if not self._console.is_terminal:
            self._console.print(" ".join(f"{self._names[index]} {self._setting} ...".split()), highlight=False)

    def advance(self, index: int, cost: float, loss: float, seconds: float) -> None:
        self._best = loss if self._best is None or loss < self._best else self._best
        total, done = self._settings[index] * self._budget, self._number * self._budget + cost
        parts = [f"{cost:.0f}/{self._budget:g}", f"lowest {short(self._best)}"]
        if done:
            parts.append(f"{clock((time.monotonic() - self._began) * (total - done) / done)} left")
        parts += [self._setting] if self._setting else []
        self._bars.update(self._tasks[index], completed=done, words=fitting(parts, self._room()))

    def end(self, index: int, run: Run) -> None:
        seconds = f"{run.final.seconds:.1f} s"
        chosen = [f"lr {run.options['lr']:g} chosen"] if self._settings[index] > 1 else []
        words = fitting([f"lowest {short(run.best.train)}", seconds, *chosen], self._room())
        self._bars.update(self._tasks[index], completed=self._settings[index] * self._budget, words=words)
        self._best = None
        if not self._console.is_terminal:
            line = f"{run.label}: lowest training loss {short(run.best.train)}, {seconds}"
            self._console.print(line, highlight=False)

    def _room(self) -> int:
        """Columns for the words beside names and bars."""
        return self._console.width - max(map(len, self._names)) - self._bar - 3


def result_table(comparison: Comparison) -> Table:
    """The comparison as a table of at most 80 columns; the lowest training loss is bold."""
    title = f"{comparison.title}: {comparison.budget:,.0f} gradient-equivalents each"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=0
    )
    table.add_column("\noptimizer", no_wrap=True)
    losses = ("lowest\ntrain", "final\ntrain", "final\nheld-out")
    for name in (*losses, "\nepochs", "grad.\neq.", "\nproducts", "\nsec."):
        table.add_column(name, justify="right", no_wrap=True)
    best = min(run.best.train for run in comparison.runs)
    for run in comparison.runs:
        end = run.final
        table.add_row(
            run.label, short(run.best.train), short(end.train), short(end.heldout), f"{end.epochs:,.0f}",
            f"{end.cost:,.0f}", f"{run.products:,}" if run.products else "–", f"{end.seconds:.1f}",
            style="bold" if run.best.train == best else "",
        )  # fmt: skip
    return table


def endings(comparison: Comparison) -> list[str]:
    """One line for each run that says how its steps, or the run itself, ended."""
    lines = []
    for run in comparison.runs:
        words = [f"{name.replace('_', ' ')} {count}" for name, count in run.statuses.items()]
        words += [run.note] if run.note else []
        if words:
            lines.append(f"{run.label}: {', '.join(words)}")
    return lines
