"""The record of a task: what tuning found and every finished run, in one file that a later call goes on with."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.strength.run import StrengthRun
from benchmarks.strength.sides import Options, Side
from imstep.runs.files import write_atomically
from imstep.runs.records import Point, Sweep, SweepRow
from imstep.runs.seconds import Seconds

FORMAT = "imstep-strength/1"
_COLUMNS = tuple(f.name for f in fields(Point))


@dataclass(frozen=True)
class StrengthRecord:
    """What is known of a task; `sweeps` and `runs` by side, and by side and seed, all in seconds of one clock."""

    task: str
    sweeps: tuple[Sweep, ...] = ()
    runs: tuple[StrengthRun, ...] = ()
    clock: Seconds = Seconds.WALL

    def by(self, clock: Seconds) -> StrengthRecord:
        """The record, to which runs by this clock are to be added.

        Raises:
            ValueError: it holds runs by another.
        """
        if self.clock is not clock and (self.sweeps or self.runs):
            raise ValueError(
                f"{self.task} is recorded in {self.clock.value} seconds, and {clock.value} seconds do not compare with "
                f"them: go on with --clock {self.clock.value}, leave it out, or name another folder by --records."
            )
        return replace(self, clock=clock)

    def sweep(self, side: Side, task: str, budget: float) -> Sweep | None:
        """The side's tuning, if it was made with these trials and this budget."""
        wanted = [dict(options) for options in side.trials_on(task)]
        found = (s for s in self.sweeps if s.optimizer == side.name and math.isclose(s.budget, budget))
        return next((s for s in found if [row.options for row in s.rows] == wanted), None)

    def run(self, side: str, seed: int, options: Options, limit: dict[str, float]) -> StrengthRun | None:
        """The finished run of that side, seed and setting."""
        wanted = (side, seed, dict(options), limit)
        return next((r for r in self.runs if (r.side, r.seed, r.options, r.limit) == wanted), None)

    def of(self, side: str) -> list[StrengthRun]:
        """The side's runs, by seed."""
        return sorted((r for r in self.runs if r.side == side), key=lambda r: r.seed)


def path_of(folder: Path, task: str) -> Path:
    """Where the task's record is."""
    return folder / f"{task}.json"


def load(folder: Path, task: str) -> StrengthRecord:
    """The record, or an empty one if there is none.

    Raises:
        ValueError: the file is not such a record.
    """
    path = path_of(folder, task)
    if not path.exists():
        return StrengthRecord(task)
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a record of format {FORMAT}: move it away, or give another --records.")
    sweeps = tuple(
        Sweep(s["optimizer"], s["budget"], tuple(SweepRow(**{**r, "loss": _number(r["loss"])}) for r in s["rows"]))
        for s in content["tuning"]
    )
    clock = Seconds(content.get("clock", "wall"))  # which earlier records do not name
    return StrengthRecord(task, sweeps, tuple(_read(run) for run in content["runs"]), clock)


def add(folder: Path, task: str, found: Sweep | StrengthRun, clock: Seconds = Seconds.WALL) -> StrengthRecord:
    """Put a sweep or a run in the place of an older one, and write. Reads the file anew: others may have added."""
    record = load(folder, task).by(clock)
    if isinstance(found, Sweep):
        others = [s for s in record.sweeps if s.optimizer != found.optimizer]
        record = replace(record, sweeps=tuple(sorted([*others, found], key=lambda s: s.optimizer)))
    else:
        kept = [r for r in record.runs if (r.side, r.seed) != (found.side, found.seed)]
        record = replace(record, runs=tuple(sorted([*kept, found], key=lambda r: (r.side, r.seed))))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path_of(folder, task), _text(record).encode())
    return record


def _text(record: StrengthRecord) -> str:
    """JSON with a line for each sweep and each run."""
    listed = lambda rows: "[\n" + ",\n".join(json.dumps(_plain(row), allow_nan=False) for row in rows) + "\n]"
    runs = [{**asdict(run), "curve": [[getattr(p, c) for c in _COLUMNS] for p in run.curve]} for run in record.runs]
    for run in runs:
        if run["error"] is None:
            del run["error"]
    return (
        f'{{"format": {json.dumps(FORMAT)}, "task": {json.dumps(record.task)}, "clock": "{record.clock.value}", '
        f'"columns": {json.dumps(_COLUMNS)},\n'
        f'"tuning": {listed([asdict(s) for s in record.sweeps])},\n"runs": {listed(runs)}}}\n'
    )


def _read(run: dict[str, Any]) -> StrengthRun:
    curve = tuple(Point(*(_number(value) for value in row)) for row in run["curve"])
    return StrengthRun(**{**run, "curve": curve})


def _plain(value: Any) -> Any:
    """`value` with numbers that JSON does not know as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
