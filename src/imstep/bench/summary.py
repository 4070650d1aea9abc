"""Who wins where, by what factor, in each currency."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from imstep.bench.entry import Entry
from imstep.bench.sides import OWN
from imstep.bench.store import BenchRun
from imstep.runs.verdict import short

__all__ = ["CLOCKS", "Duel", "Standing", "Summary", "summarise"]

CLOCKS = {"cost": "gradient-equivalents", "seconds": "seconds"}


@dataclass(frozen=True)
class Standing:
    """A contestant's runs of an entry in figures; of the measure less is better, and infinity stands for never.

    Args:
        side, title: who.
        best: the measure's best in each run, by seed.
        cost, seconds: of each run until the level.
        ends: (cost, seconds) of each run at its end.
        reference: whether it trains something else; in no duel.
    """

    side: str
    title: str
    best: tuple[float, ...]
    cost: tuple[float, ...]
    seconds: tuple[float, ...]
    ends: tuple[tuple[float, float], ...]
    reference: bool = False

    @property
    def solved(self) -> int:
        """Runs that reached the level."""
        return sum(math.isfinite(cost) for cost in self.cost)

    def median(self, column: str) -> float:
        """Of `best`, `cost` or `seconds`; of an even number the higher one."""
        return statistics.median_high(getattr(self, column))


@dataclass(frozen=True)
class Duel:
    """Our side beside the best peer in one currency, to the level.

    Args:
        peer: the peer's title.
        ours, theirs: medians; infinity for never.
    """

    peer: str
    ours: float
    theirs: float

    @property
    def factor(self) -> float:
        """How many times less we need; below 1 where the peer wins, nan where neither arrives."""
        if math.isinf(self.ours):
            return math.nan if math.isinf(self.theirs) else 0.0
        return self.theirs / max(self.ours, 1e-12)

    @property
    def words(self) -> str:
        """The winner and the factor.

        >>> Duel("SOAP", 30.0, 300.0).words, Duel("SOAP", 30.0, 15.0).words, Duel("SOAP", math.inf, 15.0).words
        ('imstep, 10 times', 'SOAP, 2.0 times', 'SOAP; imstep never')
        """
        if math.isnan(self.factor):
            return "neither"
        if math.isinf(self.factor):
            return f"imstep; {self.peer} never"
        if self.factor == 0.0:
            return f"{self.peer}; imstep never"
        won = self.factor >= 1
        times = self.factor if won else 1 / self.factor
        return f"{'imstep' if won else self.peer}, {times:.0f} times" if times >= 9.95 else (
            f"{'imstep' if won else self.peer}, {times:.1f} times"
        )


@dataclass(frozen=True)
class Summary:
    """An entry's result.

    Args:
        entry: the entry.
        level: of the measure, to which costs and seconds are told; less is better.
        standings: of all contestants with runs, the best measure first.
        duels: by clock; empty without our side or without a peer.
    """

    entry: Entry
    level: float
    standings: tuple[Standing, ...]
    duels: dict[str, Duel]

    @property
    def seeds(self) -> int:
        """Runs of the contestant with fewest."""
        return min(len(s.best) for s in self.standings)

    @property
    def leader(self) -> str:
        """Who came to the best of the measure, and by how much before our side or behind it."""
        ours = next((s for s in self.standings if s.side == OWN), None)
        first, shown = self.standings[0], self.entry.measure.shown
        text = f"{first.title} {short(shown(first.median('best')))}"
        return text if ours in (None, first) else f"{text}; imstep {short(shown(ours.median('best')))}"

    @property
    def cells(self) -> tuple[str, ...]:
        """The entry's row of the summary table."""
        level = short(self.entry.measure.shown(self.level)) if math.isfinite(self.level) else "-"
        duels = [self.duels[clock].words if clock in self.duels else "-" for clock in CLOCKS]
        return (self.entry.label, self.entry.measure.title, str(self.seeds), level, *duels, self.leader)


HEAD = ("task", "measure", "seeds", "to", "fewest gradient-eq.", "fewest seconds", "best")


def summarise(entry: Entry, runs: dict[str, Sequence[BenchRun]]) -> Summary | None:
    """The result of the runs that there are; None if there is none.

    The level is the entry's target, or else the best that both our side and the best peer reach in the median.
    """
    found = [(side, rows) for side in entry.contestants() if (rows := runs.get(side.name))]
    if not found:
        return None
    measure = entry.measure
    bests = {side.name: statistics.median_high(run.best(measure) for run in rows) for side, rows in found}
    peers = [bests[side.name] for side, _ in found if side.name != OWN and not side.reference]
    level = entry.level
    if level is None:
        level = max([*([bests[OWN]] if OWN in bests else []), *([min(peers)] if peers else [])])
    standings = [
        Standing(
            side.name,
            side.title,
            tuple(run.best(measure) for run in rows),
            tuple(run.to_reach(measure, level, "cost") for run in rows),
            tuple(run.to_reach(measure, level, "seconds") for run in rows),
            tuple((p[-1]["cost"], p[-1]["seconds"]) if (p := run.points) else (0.0, 0.0) for run in rows),
            side.reference,
        )
        for side, rows in found
    ]
    standings.sort(key=lambda s: s.median("best"))
    return Summary(entry, level, tuple(standings), _duels(standings))


def _duels(standings: Sequence[Standing]) -> dict[str, Duel]:
    ours = next((s for s in standings if s.side == OWN), None)
    peers = [s for s in standings if s.side != OWN and not s.reference]
    if ours is None or not peers:
        return {}
    found = {}
    for clock in CLOCKS:
        best = min(peers, key=lambda s: s.median(clock))
        found[clock] = Duel(best.title, ours.median(clock), best.median(clock))
    return found
