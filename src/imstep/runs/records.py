"""What a comparison measured: frozen records that survive a round trip through JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from imstep.runs.rows import present_status
from imstep.tasks import Surface

__all__ = ["Comparison", "Point", "RecordError", "Run", "Sweep", "SweepRow", "Verdict", "finite"]

FORMAT = "imstep-compare/1"


class RecordError(ValueError):
    """A file is not the record of a comparison; the message says what it is instead."""


@dataclass(frozen=True)
class Point:
    """Losses over the whole data set after `cost` gradient-equivalents (evaluations are not charged).

    Args:
        cost: gradient-equivalents spent so far (a gradient of the full batch is 1).
        seconds: time spent in steps so far, evaluations excluded.
        steps: steps taken so far.
        epochs: how often every batch was drawn; one step may pass over its batch several times.
        train: mean training loss; nan or inf if the run diverged.
        heldout: mean held-out loss.
    """

    cost: float
    seconds: float
    steps: int
    epochs: float
    train: float
    heldout: float


@dataclass(frozen=True)
class Run:
    """One optimizer's path from the common initial weights.

    Args:
        optimizer: registered name, for example "newton-krylov".
        label: for tables and legends, for example "Adam, lr 0.003, cosine".
        options: what the optimizer was made with.
        points: at least the start; costs ascend and never exceed the budget.
        products: curvature-vector products (0 for first-order methods).
        statuses: how the inner solves ended, name -> count; empty for first-order methods.
        note: empty, or why the run ended before its budget.
        anatomy: one dict per step from `StepRecord.to_dict`; empty for other optimizers.
        pictures: held-out reconstructions, shape (examples, height, width), 0 to 255; empty if none.
        surface: the final network, where it is a function of two variables with a known solution.
    """

    optimizer: str
    label: str
    options: dict[str, Any]
    points: tuple[Point, ...]
    products: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    note: str = ""
    anatomy: tuple[dict[str, Any], ...] = ()
    pictures: tuple[Any, ...] = ()
    surface: Surface | None = None

    @property
    def final(self) -> Point:
        return self.points[-1]

    @property
    def best(self) -> Point:
        """The point of the lowest training loss; the start if nothing after it was finite."""
        return min(self.points, key=lambda point: point.train if math.isfinite(point.train) else math.inf)

    @property
    def stopped(self) -> Point:
        """The point of the lowest held-out loss, where early stopping would have ended; the start if none is finite."""
        return min(self.points, key=lambda point: point.heldout if math.isfinite(point.heldout) else math.inf)

    def first_below(self, loss: float) -> Point | None:
        """The first point whose training loss is at most `loss`, or None."""
        return next((point for point in self.points if point.train <= loss), None)

    def within_seconds(self, seconds: float) -> Point:
        """The point of the lowest training loss within so many seconds."""
        inside = [point for point in self.points if point.seconds <= seconds and math.isfinite(point.train)]
        return min(inside or [self.points[0]], key=lambda point: point.train)


@dataclass(frozen=True)
class SweepRow:
    """One setting that was tried: the lowest training loss it reached within the sweep's budget."""

    options: dict[str, Any]
    loss: float
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Sweep:
    """How a baseline's setting was chosen: every row had the whole `budget`; the lowest loss wins."""

    optimizer: str
    budget: float
    rows: tuple[SweepRow, ...]

    @property
    def chosen(self) -> SweepRow:
        return min(self.rows, key=lambda row: row.loss if math.isfinite(row.loss) else math.inf)

    @property
    def at_the_edge(self) -> bool:
        """Whether the best rate is the largest or the smallest tried: a better one may lie outside."""
        rates = sorted({float(row.options["lr"]) for row in self.rows if "lr" in row.options})
        best = self.chosen.options.get("lr")
        return len(rates) > 1 and best is not None and float(best) in (rates[0], rates[-1])


@dataclass(frozen=True)
class Verdict:
    """Who reached the lowest training loss within the budget, and by what factor.

    Args:
        headline: one sentence; says plainly when NewtonKrylov is not the winner.
        details: further sentences: cost to the rival's loss, the clock, the held-out loss.
        won: whether the subject of the comparison (the first run) won.
        factor: loss of the second divided by loss of the winner, >= 1.
    """

    headline: str
    details: tuple[str, ...]
    won: bool
    factor: float


@dataclass(frozen=True)
class Comparison:
    """Runs on one task from one initial point within one budget; the first run is the subject.

    Args:
        tried: of an unfinished comparison: the runs of the contestant after those in `runs`, in the order of its
            settings.
        waiting: titles of the contestants without a run; empty once the comparison is finished.
    """

    task: str
    title: str
    description: str
    parameters: int
    seed: int
    budget: float
    batch_size: int | None
    runs: tuple[Run, ...]
    sweeps: tuple[Sweep, ...]
    environment: dict[str, str]
    command: str
    seconds: float
    verdict: Verdict
    originals: tuple[Any, ...] = ()
    solution: Surface | None = None
    tried: tuple[Run, ...] = ()
    waiting: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: a number that is not finite becomes null."""
        return {"format": FORMAT, **finite(asdict(self))}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Comparison:
        """The inverse of `to_dict` (null becomes nan).

        Raises:
            RecordError: `record` is of another format or lacks an entry.
        """
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            found = record.get("format") if isinstance(record, dict) else type(record).__name__
            raise RecordError(f"expected a record of format {FORMAT!r}, got {found!r}: run imstep compare.")
        try:
            return _read(record)
        except (KeyError, TypeError) as error:
            raise RecordError(f"the comparison's record is damaged ({error}): run imstep compare.") from error


def finite(value: Any) -> Any:
    """`value` with tuples as lists and numbers that JSON does not know as None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _read(record: dict[str, Any]) -> Comparison:
    entries = {key: value for key, value in record.items() if key != "format"}
    runs, tried = (tuple(_read_run(run) for run in entries.pop(name, ())) for name in ("runs", "tried"))
    waiting = tuple(entries.pop("waiting", ()))
    sweeps = tuple(
        Sweep(**{**sweep, "rows": tuple(_read_row(row) for row in sweep["rows"])})
        for sweep in entries.pop("sweeps")
    )
    verdict = Verdict(**{**entries.pop("verdict"), "details": tuple(record["verdict"]["details"])})
    originals = tuple(entries.pop("originals"))
    solution = _read_surface(entries.pop("solution", None))
    return Comparison(
        **entries, runs=runs, sweeps=sweeps, verdict=verdict, originals=originals, solution=solution, tried=tried,
        waiting=waiting,
    )  # fmt: skip


def _read_surface(surface: dict[str, Any] | None) -> Surface | None:
    return None if surface is None else Surface(**surface)


def _read_row(row: dict[str, Any]) -> SweepRow:
    return SweepRow(**{**row, "loss": _number(row["loss"])})


def _read_run(run: dict[str, Any]) -> Run:
    points = tuple(
        Point(**{**p, "train": _number(p["train"]), "heldout": _number(p["heldout"])}) for p in run["points"]
    )
    statuses = {present_status(name): count for name, count in run["statuses"].items()}
    anatomy = tuple({k: present_status(v) if k == "status" else v for k, v in s.items()} for s in run["anatomy"])
    read = {"anatomy": anatomy, "statuses": statuses, "pictures": tuple(run["pictures"])}
    return Run(**{**run, "points": points, **read, "surface": _read_surface(run.get("surface"))})
