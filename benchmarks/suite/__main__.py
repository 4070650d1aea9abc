"""The record of `imstep bench`: every run, a file a task, and from them the tables of docs/bench.md.

python -m benchmarks.suite                    # every task that is not recorded whole, the shortest first
python -m benchmarks.suite abalone 'memory-*' # some of them
python -m benchmarks.suite --jobs 2           # two runs at a time, on two cores
python -m benchmarks.suite --table            # the tables again, from the records

Runs are kept one by one below runs/suite. Ctrl-C finishes the present one; then, as at the end of a task, all that
there is goes into the records, and the same command goes on. Each run has one thread and is told in processor seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.record_page import DOCS, put, table
from imstep.bench.entries import ENTRIES, entries_of
from imstep.bench.entry import Entry
from imstep.bench.request import BenchRequest, estimate, gather
from imstep.bench.session import run_bench
from imstep.bench.sides import OWN
from imstep.bench.store import BenchRun, Store
from imstep.bench.summary import HEAD, summarise
from imstep.bench.sweep import HEAD as SWEEP_HEAD
from imstep.bench.sweep import sweeps
from imstep.runs.files import write_atomically

RECORDS = Path(__file__).resolve().parent / "records"
FOLDER = Path("runs/suite")
_MACHINE = ("processor", "instructions", "cores", "threads", "PyTorch")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, make what is missing, write records and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="entries of `imstep bench --list`, or patterns")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"of the runs ({FOLDER})")
    parser.add_argument("--jobs", type=int, default=1, help="runs that go side by side")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    named = [entry for name in options.tasks for entry in entries_of(name)]
    store = Store(options.folder)
    for entry in ENTRIES.values():
        unpack(entry, store)
    for entry in [] if options.table else named or sorted(ENTRIES.values(), key=_hours):
        done = run_bench(BenchRequest([entry]), options.folder, Console(emoji=False), jobs=options.jobs)
        pack(entry, store)
        if not done:
            break
    put("bench", DOCS / "bench.md", page(BenchRequest(list(ENTRIES.values())), store))


def _hours(entry: Entry) -> float:
    return sum(estimate(entry, side) for side in entry.contestants())


def unpack(entry: Entry, store: Store, records: Path = RECORDS) -> None:
    """Put the recorded runs of a task where the bench looks for them; those that are there stay."""
    path = records / f"{entry.label}.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        store.take_in(json.loads(line))


def pack(entry: Entry, store: Store, records: Path = RECORDS) -> None:
    """Write all runs of a task into its record, a line each."""
    files = sorted(store.path(entry.label, OWN, "").parents[1].glob("*/*.json"))
    if files:
        records.mkdir(exist_ok=True)
        write_atomically(records / f"{entry.label}.jsonl", b"".join(file.read_bytes() for file in files))


def page(request: BenchRequest, store: Store) -> str:
    """How much is recorded, who wins where, and the sweeps."""
    runs = {entry.label: dict(gather(request, entry, store)[1]) for entry in request.entries}
    results = [found for entry in request.entries if (found := summarise(entry, runs[entry.label])) is not None]
    if not results:
        return "No run is recorded yet."
    whole = sum(r.seeds == len(request.seeds) and len(r.standings) == len(r.entry.contestants()) for r in results)
    told = f"{whole} of {len(request.entries)} tasks are recorded with all contestants and {len(request.seeds)} seeds"
    parts = [told + (f", {len(results) - whole} in part." if whole < len(results) else ".")]
    parts.append(table(HEAD, [result.cells for result in results]))
    parts += [f"{s.title}. {s.words}\n\n{table(SWEEP_HEAD, s.rows)}" for s in sweeps(request.entries, runs)]
    parts.append(_made(run for made in runs.values() for rows in made.values() for run in rows))
    return "\n\n".join(parts)


def _made(runs: Iterable[BenchRun]) -> str:
    """When and on what."""
    about = [run.record["about"] for run in runs]
    dates, loads = sorted(a["date"] for a in about), [float(a["load average"]) for a in about]
    machine = "; ".join(f"{key} {' or '.join(sorted({a[key] for a in about}))}" for key in _MACHINE)
    return (
        f"{len(about)} runs, {dates[0]} to {dates[-1]}; {machine}; load average when a run began {min(loads):g} to "
        f"{max(loads):g}. Seconds are the processor's."
    )


if __name__ == "__main__":
    main()
