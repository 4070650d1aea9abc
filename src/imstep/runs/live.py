"""Live progress of a comparison on a terminal: one bar for every optimizer; plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from imstep.runs.records import Comparison, Run
from imstep.runs.verdict import short

__all__ = ["ComparisonProgress", "endings", "result_table"]


class _Losses(ProgressColumn):
    """The loss of the setting that runs, and the lowest so far."""

    def render(self, task: Task) -> Text:
        loss, best = task.fields["loss"], task.fields["best"]
        if loss is None:
            return Text("waiting", style="dim")
        return Text.assemble(f"loss {short(loss):>8}", (f"   lowest {short(best):>8}", "bold"))


class ComparisonProgress:
    """A listener for `compare` that draws; use it as a context manager.

    Args:
        console: where to draw; without a terminal, one line per finished setting and optimizer is printed.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.fields[title]}"),
            BarColumn(bar_width=26),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f} gradient-eq."),
            _Losses(),
            TextColumn("[dim]{task.fields[doing]}"),
            console=console,
            refresh_per_second=8,
        )
        self._tasks: list[TaskID] = []
        self._titles: list[str] = []
        self._budgets: list[float] = []
        self._done: list[float] = []
        self._cost = 0.0

    def __enter__(self) -> ComparisonProgress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def announce(self, note: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(note, highlight=False)

    def begin(self, titles: Sequence[str], budgets: Sequence[float]) -> None:
        self._titles, self._budgets, self._done = list(titles), list(budgets), [0.0] * len(titles)
        width = max(map(len, titles))
        self._tasks = [
            self._bars.add_task("", total=budget, title=title.ljust(width), doing="", loss=None, best=None)
            for title, budget in zip(titles, budgets, strict=True)
        ]

    def candidate(self, index: int, label: str) -> None:
        self._done[index] += self._cost
        self._cost = 0.0
        self._bars.update(self._tasks[index], doing=label.removeprefix(f"{self._titles[index]}, "))
        if not self._console.is_terminal:
            self._console.print(f"{label} ...", highlight=False)

    def advance(self, index: int, cost: float, loss: float, seconds: float) -> None:
        task = self._tasks[index]
        before = self._bars.tasks[index].fields["best"]
        best = loss if before is None or loss < before else before
        self._cost = cost
        self._bars.update(task, completed=self._done[index] + cost, loss=loss, best=best)

    def end(self, index: int, run: Run) -> None:
        self._cost = 0.0
        text = f"{run.final.seconds:.1f} s" if run.label == self._titles[index] else f"chosen: {run.label}"
        task, total = self._tasks[index], self._budgets[index]
        self._bars.update(task, completed=total, loss=run.final.train, best=run.best.train, doing=text)
        if not self._console.is_terminal:
            line = f"{run.label}: lowest training loss {short(run.best.train)}, {run.final.seconds:.1f} s"
            self._console.print(line, highlight=False)


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
