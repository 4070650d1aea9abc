"""Which operators an evaluation met, how each was differentiated, and where the time went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

AVOIDED = "avoided kernel"
NO_DERIVATIVE = "no derivative"


@dataclass(frozen=True)
class OperatorUse:
    """One operator and what became of it.

    Attributes:
        operator: its name.
        treatment: the family of its rule; or "decomposition", "cut" (a constant: under no_grad or detached), "avoided
            kernel" (a fused kernel whose derivative is out of reach: simpler operators, listed as well, stand for it),
            "no derivative" (taken to be zero where it does not exist; the operator is listed by its rule as well).
        count: how often it was met, forward and backward.
        seconds: time on the host that was spent on it, without what it called; 0 for the last two treatments.
        share: ``seconds`` over the time of the whole evaluation, in [0, 1].
    """

    operator: str
    treatment: str
    count: int
    seconds: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class OperatorReport:
    """All operators that carried an imaginary part, the most expensive first; ``print`` shows a table.

    Attributes:
        uses: the operators.
        note: what else there is to say; empty if nothing.
        seconds: time of the evaluation, the user's own code and autograd included. On a GPU, which works on its own
            time, all times are those of the host.

    Example:
        >>> print(OperatorReport.of([(("aten.mm.default", "multilinear"), 6, 0.3)], seconds=0.5))
        operator         treatment    count  share
        aten.mm.default  multilinear      6    60%
        everything else                        40%
    """

    uses: tuple[OperatorUse, ...]
    note: str = ""
    seconds: float = 0.0

    @classmethod
    def of(cls, met: Iterable[tuple[tuple[str, str], int, float]], seconds: float) -> OperatorReport:
        """A report from ((operator, treatment), count, seconds) and the time of the whole evaluation."""
        total = max(seconds, 1e-9)
        uses = (OperatorUse(name, how, count, spent, spent / total) for (name, how), count, spent in met)
        return cls(tuple(sorted(uses, key=lambda use: (-use.seconds, -use.count, use.operator))), seconds=seconds)

    def __str__(self) -> str:
        rows = [("operator", "treatment", "count", "share")]
        for use in self.uses:
            share = "" if use.treatment in (AVOIDED, NO_DERIVATIVE) else f"{use.share:.0%}"
            rows.append((use.operator, use.treatment, str(use.count), share))
        rows.append(("everything else", "", "", f"{max(0.0, 1 - sum(use.share for use in self.uses)):.0%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = "\n".join(
            f"{name:<{widths[0]}}  {how:<{widths[1]}}  {count:>{widths[2]}}  {share:>{widths[3]}}"
            for name, how, count, share in rows
        )
        return f"{table}\n{self.note}" if self.note else table


class _Entry:
    """What is known so far of one operator, differentiated in one way."""

    __slots__ = ("count", "operator", "seconds", "treatment")

    def __init__(self, operator: Any, treatment: str) -> None:
        self.operator, self.treatment = operator, treatment
        self.count, self.seconds = 0, 0.0


class Ledger:
    """Counts and times the operators of one evaluation as it goes; two looks at the clock for each."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, str], _Entry] = {}
        self._open: list[_Entry] = []
        self._mark = self._total = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """The evaluation begins, or goes on."""
        self._started = perf_counter()

    def stop(self) -> None:
        """The evaluation ends."""
        self._total += self._running()
        self._started = None

    def _running(self) -> float:
        return 0.0 if self._started is None else perf_counter() - self._started

    def enter(self, operator: Any, treatment: str) -> None:
        """Work on an operator begins; that on the one around it rests."""
        key = id(operator), treatment  # an operator itself is slow to hash
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(operator, treatment)
        entry.count += 1
        now = perf_counter()
        if self._open:
            self._open[-1].seconds += now - self._mark
        self._open.append(entry)
        self._mark = now

    def leave(self) -> None:
        """Work on the operator that was entered last ends."""
        now = perf_counter()
        self._open.pop().seconds += now - self._mark
        self._mark = now

    def avoid(self, kernel: str) -> None:
        """A kernel was replaced by simpler operators."""
        self._entries.setdefault((kernel, AVOIDED), _Entry(kernel, AVOIDED)).count += 1

    def mark(self, operator: Any) -> None:
        """An operator was met where it has no derivative."""
        self._entries.setdefault((id(operator), NO_DERIVATIVE), _Entry(operator, NO_DERIVATIVE)).count += 1

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """How often each operator was met, by (name, treatment)."""
        return {(str(e.operator), e.treatment): e.count for e in self._entries.values()}

    def report(self) -> OperatorReport:
        """What was met so far."""
        met = (((str(e.operator), e.treatment), e.count, e.seconds) for e in self._entries.values())
        return OperatorReport.of(met, self._total + self._running())
