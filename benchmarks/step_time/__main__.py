"""What a step of a small model costs: gradient, record, product and step, beside those of another checkout.

    python -m benchmarks.step_time --against ../before   # what the record lacks; writes record.json and the page
    python -m benchmarks.step_time --quick               # a smoke test of one side; prints, writes nothing
    python -m benchmarks.step_time --table               # the page again, from the record

Both sides run in turn, each time in a process of its own, on the same random numbers. Of each step the least of all
turns counts, in processor seconds of the thread, since the machine may be busy; then the median over steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record_page import Row, complete, load, show, table
from benchmarks.step_time.side import TASKS, measured

NAME = "step-time"
TURNS = 2
PARTS = ("gradient", "record", "replay", "step")
SIDE = Path(__file__).with_name("side.py")
HERE = SIDE.parents[2]


def once(checkout: Path, task: str) -> dict[str, Any]:
    """One side, in a process of its own."""
    settings = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SIDE), task]
    return json.loads(subprocess.run(command, env=settings, check=True, capture_output=True, text=True).stdout)


def run(task: str, against: Path) -> Row:
    """Milliseconds of both sides."""
    sides: dict[str, list[dict[str, Any]]] = {"now": [], "before": []}
    for _ in range(TURNS):
        sides["now"].append(once(HERE, task))
        sides["before"].append(once(against, task))
    row: Row = {}
    for side, turns in sides.items():
        for part in PARTS:
            if part in turns[0]:
                least = [min(taken) for taken in zip(*(turn[part] for turn in turns), strict=True)]
                row[f"{part}, {side}"] = 1e3 * statistics.median(least)
        row[f"loss, {side}"] = turns[0]["loss"]
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
        rows.append([*cells, f"{row['step, now'] / row['step, before']:.2f}"])
    head = ["task", *(f"{part}, {side}" for part in PARTS for side in ("before", "now")), "step, now over before"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--quick", action="store_true", help="one task of this side; prints, writes nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    options = parser.parse_args()
    if options.quick:
        print({part: min(taken) for part, taken in measured("digits-mlp").items() if part in PARTS})
        return
    if options.table:
        show(NAME, NAME, text_of(load(NAME)))
        return
    if options.against is None:
        parser.error("--against names the checkout to compare with; --table only writes the page")
    version = subprocess.run(
        ["git", "-C", str(options.against), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    runs = {task: partial(run, task, options.against.resolve()) for task in TASKS}
    show(NAME, NAME, text_of(complete(NAME, {"before": version}, runs)))


if __name__ == "__main__":
    main()
