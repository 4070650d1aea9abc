"""What a record says, as tables of plain cells: for the terminal and for the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.strength.record import StrengthRecord
from benchmarks.strength.run import StrengthRun
from benchmarks.strength.sides import SIDES, Side
from benchmarks.strength.tasks import StrengthTask
from imstep.runs.verdict import short

SOAP = "soap"
"""What the names of all sides of the strongest peer begin with."""


@dataclass(frozen=True)
class Cells:
    """A table: `rows` of as many texts as `head` has."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def results(task: StrengthTask, record: StrengthRecord, spread: bool) -> Cells:
    """A row for each side: losses at the marks, what the levels cost, the whole run on the other clock.

    Args:
        task: the task.
        record: its record.
        spread: also the lowest and the highest of the seeds; otherwise their median alone.
    """
    head = ["side", "seeds"]
    for mark in task.marks:
        head += [f"train, {mark:g} eq."] if task.axis == "cost" else [f"train, {mark:g} s", f"held-out, {mark:g} s"]
    for level in task.levels:
        head += [f"eq. to {short(level)}", f"s to {short(level)}"]
    head += ["s in all", "held-out, end"] if task.axis == "cost" else ["eq. in all"]
    rows = [_result(task, name, record.of(name), spread) for name in task.sides if record.of(name)]
    return Cells(tuple(head), tuple(rows))


def _result(task: StrengthTask, name: str, runs: list[StrengthRun], spread: bool) -> tuple[str, ...]:
    loss = lambda values: _text(values, spread, short)
    count = lambda values: _text(values, spread, "{:,.0f}".format)
    row = [SIDES[name].title, str(len(runs))]
    for mark in task.marks:
        if task.axis == "cost":
            row.append(loss([r.best_at("cost", mark).train for r in runs]))
        else:
            points = [r.last_at("seconds", mark) for r in runs]
            row += [loss([p.train for p in points]), loss([p.heldout for p in points])]
    for level in task.levels:
        reached = [r.first_below(level) for r in runs]
        row.append(count([p.cost if p else math.inf for p in reached]))
        row.append(count([p.seconds if p else math.inf for p in reached]))
    ends = [r.curve[-1] for r in runs]
    if task.axis == "seconds":
        return (*row, count([p.cost for p in ends]))
    return (*row, count([p.seconds for p in ends]), loss([p.heldout for p in ends]))


def _text(values: Sequence[float], spread: bool, form: Callable[[float], str]) -> str:
    """The median, of an even number the higher one, and the extremes; infinity stands for never."""
    show = lambda v: form(v) if math.isfinite(v) else "never"
    middle = show(statistics.median_high(values))
    if not spread or len(values) == 1 or min(values) == max(values):
        return middle
    return f"{middle} ({show(min(values))} to {show(max(values))})"


def verdicts(task: StrengthTask, record: StrengthRecord) -> Cells:
    """The figures to reach, what was measured, met or missed; empty where a side is missing."""
    own = record.of(task.own)
    peers = [run for name in task.sides if name.startswith(SOAP) for run in record.of(name)]
    if not own or not peers:
        return Cells((), ())
    rows = _levels(task, own, peers) if task.levels else _marks(task, own, peers)
    return Cells(("figure", "bound", "measured", "verdict"), tuple(rows))


def _levels(task: StrengthTask, own: list[StrengthRun], peers: list[StrengthRun]) -> list[tuple[str, ...]]:
    """Every seed reaches each level within its mark, one of them in a share of the time of the fastest SOAP."""
    rows = []
    for level, mark in zip(task.levels, task.marks, strict=True) if task.race is None else ():
        reached = [p.cost if (p := run.first_below(level)) else math.inf for run in own]
        rows.append(_row(f"equivalents to {short(level)}, worst seed", mark, max(reached), "{:,.0f}".format))
    level, ratios = task.levels[-1] if task.race is None else task.race, []
    for run in own:
        theirs = [p for p in peers if p.seed == run.seed]
        # A run that never came there would have taken longer still.
        fastest = min((p.first_below(level) or p.curve[-1]).seconds for p in theirs) if theirs else math.nan
        point = run.first_below(level)
        ratios.append(point.seconds / fastest if point else math.inf)
    name = f"seconds to {short(level)} / the fastest SOAP's of the seed, worst seed"
    rows.append(_row(name, task.share, max(ratios), "{:.2f}".format))
    if task.lowest is not None:
        worst = max(run.best_at("cost", math.inf).train for run in own)
        rows.append(_row("lowest training loss, worst seed", task.lowest, worst, short))
    return rows


def _marks(task: StrengthTask, own: list[StrengthRun], peers: list[StrengthRun]) -> list[tuple[str, ...]]:
    """At each mark the median losses are not above those of the best SOAP."""
    rows = []
    for mark in task.marks:
        for what, title in (("train", "training"), ("heldout", "held-out")):
            ours = statistics.median_high(getattr(r.last_at("seconds", mark), what) for r in own)
            sides = {r.side for r in peers}
            theirs = min(
                statistics.median_high(getattr(r.last_at("seconds", mark), what) for r in peers if r.side == side)
                for side in sides
            )
            rows.append(_row(f"{title} loss after {mark:g} s, median; SOAP's as the bound", theirs, ours, short))
    return rows


def _row(name: str, bound: float, value: float, form: Callable[[float], str]) -> tuple[str, ...]:
    text = form(value) if math.isfinite(value) else "never"
    return name, form(bound), text, "met" if value <= bound else "**missed**"


def tuning(
    task: StrengthTask,
    record: StrengthRecord,
    sides: Mapping[str, Side] = SIDES,
    budget: str = "equivalents a trial",
) -> Cells:
    """What tuning tried and what it chose; ``budget`` heads what a trial had."""
    rows = []
    for name in task.sides:
        for sweep in (s for s in record.sweeps if s.optimizer == name):
            tried = "; ".join(f"{_options(row.options)}: {short(row.loss)}" for row in sweep.rows)
            rows.append((sides[name].title, f"{sweep.budget:g}", tried, _options(sweep.chosen.options)))
    return Cells(("side", budget, "training loss of the trials", "chosen"), tuple(rows))


def _options(options: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def as_table(title: str, content: Cells) -> Table:
    """The cells for the terminal."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    for index, name in enumerate(content.head):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in content.rows:
        table.add_row(*(cell.replace("**", "") for cell in row))
    return table
