"""What a step of a small model costs: gradient, record, product and step, beside those of another checkout.

    python -m benchmarks.step_time --against ../before   # what the record lacks; writes record.json and the page
    python -m benchmarks.step_time --quick               # a smoke test of one side; prints, writes nothing
    python -m benchmarks.step_time --table               # the page again, from the record

Both sides run at once, each in a process of its own and on the same random numbers, and take turns call by call. What
counts is the median, in processor seconds of the thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record_page import Row, complete, load, show, table
from benchmarks.step_time.side import TASKS

NAME = "step-time"
WARM = 12  # steps before measuring: what is remembered from step to step has settled then
CALLS = 16
PARTS = ("gradient", "record", "replay", "step")
SIDE = Path(__file__).with_name("side.py")
HERE = SIDE.parents[2]


class Side:
    """A process that runs a task with a checkout."""

    def __init__(self, checkout: Path, task: str) -> None:
        settings = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
        command, pipe = [sys.executable, str(SIDE), task], subprocess.PIPE
        self._process = subprocess.Popen(command, env=settings, stdin=pipe, stdout=pipe, text=True)
        self.parts = self._line().split()

    def seconds(self, part: str) -> float:
        """Of one call."""
        assert self._process.stdin is not None
        print(part, file=self._process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def run(task: str, checkouts: dict[str, Path], warm: int = WARM, calls: int = CALLS) -> Row:
    """Milliseconds of all sides."""
    sides = {name: Side(checkout, task) for name, checkout in checkouts.items()}
    row: Row = {}
    for side in sides.values():
        for _ in range(warm if "step" in side.parts else 1):
            for part in side.parts if "step" not in side.parts else ["step"]:
                side.seconds(part)
    for part in next(iter(sides.values())).parts:
        taken = [{name: side.seconds(part) for name, side in sides.items()} for _ in range(calls)]
        row.update({f"{part}, {name}": 1e3 * statistics.median(turn[name] for turn in taken) for name in sides})
    for side in sides.values():
        side.close()
    return row


def text_of(record: dict[str, Any]) -> str:
    """The table of the page: milliseconds, and gradients of the same side."""
    rows = []
    for task, row in record["runs"].items():
        cells = [task, *(f"{row[f'gradient, {side}']:.3g}" for side in ("before", "now"))]
        for part in ("record", "replay", "step"):
            for side in ("before", "now"):
                taken = row.get(f"{part}, {side}")
                cells.append("" if taken is None else f"{taken:.3g} ({taken / row[f'gradient, {side}']:.1f})")
        first = [row[f"{part}, now"] / row["gradient, now"] for part in ("record", "replay") if f"{part}, now" in row]
        ratio = f"{row['step, now'] / row['step, before']:.2f}" if "step, now" in row else ""
        rows.append([*cells, f"{sum(first):.1f}" if first else "", ratio])
    head = ["task", *(f"{part}, {side}" for part in PARTS for side in ("before", "now"))]
    head += ["first product, gradients", "step, now over before"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--quick", action="store_true", help="one task of this side; prints, writes nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    options = parser.parse_args()
    if options.quick:
        print(run("digits-mlp", {"now": HERE}, 1, 2))
        return
    if options.table:
        show(NAME, "residual-space", text_of(load(NAME)))
        return
    if options.against is None:
        parser.error("--against names the checkout to compare with; --table only writes the page")
    version = subprocess.run(
        ["git", "-C", str(options.against), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    runs = {task: partial(run, task, {"before": options.against.resolve(), "now": HERE}) for task in TASKS}
    show(NAME, "residual-space", text_of(complete(NAME, {"before": version}, runs)))


if __name__ == "__main__":
    main()
