"""The folder of a bench: a file for each finished run, written once and never replaced."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imstep.bench.entry import Measure
from imstep.bench.work import FORMAT, Job
from imstep.runs.files import obstacle, write_atomically
from imstep.runs.records import RecordError
from imstep.runs.rundir import RunDirectoryError

__all__ = ["BenchRun", "Store"]

Point = Mapping[str, Any]


@dataclass(frozen=True)
class BenchRun:
    """A finished run as its file tells it."""

    record: Mapping[str, Any]

    @property
    def side(self) -> str:
        """The contestant."""
        return str(self.record["request"]["side"])

    @property
    def seed(self) -> int:
        """Of weights and batches."""
        return int(self.record["request"]["seed"])

    @property
    def options(self) -> dict[str, float]:
        """That differ from the optimizer's defaults."""
        return dict(self.record["request"]["options"])

    @property
    def points(self) -> list[Point]:
        """The curve: a dict of columns at each evaluation."""
        return [dict(zip(self.record["columns"], row, strict=True)) for row in self.record["curve"]]

    def best(self, measure: Measure) -> float:
        """The least of the measure; infinity if the run has no finite one."""
        return min((measure.value(p) for p in self.points), default=math.inf)

    def to_reach(self, measure: Measure, level: float, clock: str) -> float:
        """Cost or seconds until the measure is at most `level`; infinity for never."""
        return next((float(p[clock]) for p in self.points if measure.value(p) <= level), math.inf)


class Store:
    """The runs below a folder: `ENTRY/SIDE/KIND.json`.

    Args:
        root: the folder; made when the first run is kept.

    Raises:
        RunDirectoryError: it holds other things than a bench, or cannot be written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if root.exists() and not root.is_dir():
            raise RunDirectoryError(f"{root} is a file. Choose another --out.")
        if (above := obstacle(root)) is not None:
            raise RunDirectoryError(f"nothing can be made in {above}. Choose another --out.")
        if root.exists() and any(root.iterdir()) and not (root / "bench.json").exists():
            raise RunDirectoryError(f"{root} exists and holds other files. Choose another --out.")

    def path(self, entry: str, side: str, kind: str) -> Path:
        """Where the run is or will be."""
        return self.root / entry.replace("/", "_") / side.replace("/", "_").replace(":", "-") / f"{kind}.json"

    def find(self, job: Job) -> BenchRun | None:
        """The finished run of that request, if it was made.

        Raises:
            RunDirectoryError: there is a run of its name by another request, which is not replaced.
        """
        path = self.path(job.entry.label, job.side, job.kind)
        if not path.exists():
            return None
        run = read(path)
        wanted = json.loads(json.dumps(job.request))
        found = {"clock": "wall", **run.record["request"]}  # which earlier runs do not name
        if found != wanted:
            differing = next(key for key in wanted if found.get(key) != wanted[key])
            why = "Seconds of two clocks do not compare, and runs" if differing == "clock" else "Runs"
            raise RunDirectoryError(
                f"{path} was made with {differing}={found.get(differing)}, and {wanted[differing]} is asked for now. "
                f"{why} are not replaced: choose another --out, or ask for what was asked for then."
            )
        return run

    def keep(self, job: Job, record: Mapping[str, Any]) -> BenchRun:
        """Write a finished run."""
        return self._write(self.path(job.entry.label, job.side, job.kind), record)

    def take_in(self, record: Mapping[str, Any]) -> None:
        """Write a run that was made elsewhere, unless it is there."""
        path = self.path(record["entry"], record["request"]["side"], record["kind"])
        if not path.exists():
            self._write(path, record)

    def _write(self, path: Path, record: Mapping[str, Any]) -> BenchRun:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (self.root / "bench.json").exists():
            write_atomically(self.root / "bench.json", json.dumps({"format": FORMAT}).encode() + b"\n")
        write_atomically(path, (json.dumps(record, allow_nan=False) + "\n").encode())
        return BenchRun(record)


def read(path: Path) -> BenchRun:
    """The run of a file.

    Raises:
        RecordError: it is not the record of a run.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error}): move it away, and the run is made anew.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(f"{path} is not a run of format {FORMAT}: move it away, and the run is made anew.")
    return BenchRun(record)
