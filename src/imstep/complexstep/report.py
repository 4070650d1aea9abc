"""Which operators an evaluation met, and how each was differentiated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OperatorUse:
    """One operator: its name, the family of its rule (or "decomposition", "cut"), how often it was met."""

    operator: str
    treatment: str
    count: int


@dataclass(frozen=True)
class OperatorReport:
    """All operators that carried an imaginary part, the most frequent first; ``print`` shows a table.

    Attributes:
        uses: the operators.
        note: what else there is to say; empty if nothing.

    Example:
        >>> print(OperatorReport.of([(("aten.mm.default", "multilinear"), 6)]))
        operator         treatment    count
        aten.mm.default  multilinear      6
    """

    uses: tuple[OperatorUse, ...]
    note: str = ""

    @classmethod
    def of(cls, counts: Iterable[tuple[tuple[str, str], int]]) -> OperatorReport:
        """A report from ((operator, treatment), count) pairs."""
        uses = (OperatorUse(name, how, count) for (name, how), count in counts)
        return cls(tuple(sorted(uses, key=lambda use: (-use.count, use.operator))))

    def __str__(self) -> str:
        rows = [("operator", "treatment", "count")]
        rows += [(use.operator, use.treatment, str(use.count)) for use in self.uses]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        table = "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)
        return f"{table}\n{self.note}" if self.note else table
