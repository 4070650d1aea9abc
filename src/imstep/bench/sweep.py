"""A task by batches of many sizes: steps, seconds and ideal parallel time to one loss, and from which on we lead."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imstep.bench.entry import Entry
from imstep.bench.sides import OWN
from imstep.bench.store import BenchRun
from imstep.runs.verdict import short

__all__ = ["CURRENCIES", "Cell", "Sweep", "sweeps"]

CURRENCIES = {"steps": "steps", "depth": "ideal parallel time", "seconds": "seconds"}
"""What is counted until the level.

Ideal parallel time is that of the evaluations one after the other, in gradients, if each batch was spread over as many
processors as it has smallest batches: a step's gradient-equivalents of its own batch. What processors tell each other,
and what vectors and small matrices cost, is left out.
"""


@dataclass(frozen=True)
class Cell:
    """A contestant at a batch size; medians of the seeds, of an even number the higher; infinity for never.

    Args:
        batch_size, side, title: which.
        solved, seeds: runs that reached the level, of how many.
        steps, depth, seconds: to it; see `CURRENCIES`.
    """

    batch_size: int
    side: str
    title: str
    solved: int
    seeds: int
    steps: float
    depth: float
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Args:
        name: the sweep's.
        measure: what is measured.
        level: of it, as shown.
        cells: by batch size, our side first.
    """

    name: str
    measure: str
    level: float
    cells: tuple[Cell, ...]

    def leads_from(self, currency: str) -> int | None:
        """The smallest batch size from which on our side is first at all larger ones; None if at the largest it is not.
        """
        found = None
        for size in sorted({cell.batch_size for cell in self.cells}, reverse=True):
            here = {cell.side: getattr(cell, currency) for cell in self.cells if cell.batch_size == size}
            ours, peers = here.pop(OWN, math.inf), here.values()
            if not peers or math.isinf(ours) or ours > min(peers):
                break
            found = size
        return found

    @property
    def title(self) -> str:
        """What the table is of."""
        return f"{self.name} by batch size, to a {self.measure} of {short(self.level)}"

    @property
    def words(self) -> str:
        """From which batch size on we lead, in each currency."""
        told = []
        for currency, title in CURRENCIES.items():
            size = self.leads_from(currency)
            told.append(f"{title}: " + ("not at the largest batch" if size is None else f"from batches of {size:,} on"))
        return f"imstep is first in {'; '.join(told)}."

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Of the table, below `HEAD`."""
        show = lambda value: f"{value:,.0f}" if math.isfinite(value) else "never"
        return [
            (f"{c.batch_size:,}", c.title, f"{c.solved}/{c.seeds}", show(c.steps), show(c.depth), show(c.seconds))
            for c in self.cells
        ]


HEAD = ("batch", "contestant", "reached", *CURRENCIES.values())


def sweeps(entries: Sequence[Entry], runs: Mapping[str, Mapping[str, Sequence[BenchRun]]]) -> list[Sweep]:
    """The sweeps among entries, from the runs that there are; `runs` by label and side.

    Only entries with a target take part, which all of a sweep share.
    """
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.sweep and entry.batch_size and entry.target is not None and any(runs.get(entry.label, {}).values()):
            found.setdefault(entry.sweep, []).append(entry)
    made = []
    for name, members in found.items():
        ordered = sorted(members, key=lambda entry: entry.batch_size or 0)
        cells = [
            _cell(entry, side.name, side.title, rows)
            for entry in ordered
            for side in entry.contestants()
            if (rows := runs[entry.label].get(side.name))
        ]
        measure, target = ordered[0].measure, ordered[0].target
        assert target is not None
        made.append(Sweep(name, measure.title, target, tuple(cells)))
    return made


def _cell(entry: Entry, side: str, title: str, rows: Sequence[BenchRun]) -> Cell:
    level = entry.level
    assert entry.batch_size is not None
    assert level is not None
    reached = [next((p for p in run.points if entry.measure.value(p) <= level), None) for run in rows]
    of = lambda find: statistics.median_high(math.inf if p is None else float(find(p)) for p in reached)
    return Cell(
        entry.batch_size, side, title, sum(p is not None for p in reached), len(rows), of(lambda p: p["step"]),
        # Costs are of all examples; an epoch has so many steps as all examples have batches.
        of(lambda p: p["cost"] * p["step"] / p["epoch"] if p["step"] else 0.0), of(lambda p: p["seconds"]),
    )  # fmt: skip
