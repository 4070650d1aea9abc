"""The race of physics-informed networks: LeastSquares with its defaults beside published rivals, tuned.

python -m benchmarks.pinn                                  # every task, side and seed that the records lack
python -m benchmarks.pinn --tasks poisson-2d --seeds 0 1   # some of them; also --sides
python -m benchmarks.pinn --table                          # the tables and the page again, from the records
python -m benchmarks.pinn --short --records /some/folder   # a smoke test: one seed, a hundredth of the time

Runs are kept at once, in one file a task; the same command goes on after an interruption, and begins with the hours
that are left. One thread, on a machine that does nothing else; or, for a task without a record, by the seconds that the
processor computes for a run, with --clock processor. To measure anew, delete benchmarks/pinn/records/*.json or name
another folder.

SOAP: pip install -c constraints.txt '.[peers]'; without it that side is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.pinn.page import SEEDS, write_page
from benchmarks.pinn.sides import SIDES
from benchmarks.pinn.table import hours, results, summary
from benchmarks.pinn.tasks import TASKS
from benchmarks.strength.record import load
from benchmarks.strength.session import QUICK, Session, run_all
from benchmarks.strength.table import as_table
from imstep.runs.seconds import Seconds

RECORDS = Path(__file__).resolve().parent / "records"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, make what is missing, show and write the tables."""
    parser = _parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
    session = Session(console, options.records, None, QUICK if options.short else 1.0, Seconds(options.clock))
    tasks, seeds = [TASKS[name] for name in options.tasks or TASKS], options.seeds[: 1 if options.short else None]
    recorded = lambda: [load(options.records, task.name) for task in tasks]
    if not options.table:
        try:
            for record in recorded():
                record.by(session.clock)
        except ValueError as error:
            parser.error(str(error))
        left = session.scale * hours(tasks, recorded(), options.sides, seeds)
        console.print(f"{left:.2g} hours of steps are left, and about a tenth more for evaluations.", highlight=False)
    try:
        for task in [] if options.table else tasks:
            run_all(session, task, SIDES, options.sides, seeds)
    except KeyboardInterrupt:
        console.print("Interrupted. Finished runs are kept; the same command goes on.")
        return
    for task, record in zip(tasks, recorded(), strict=True):
        console.print(as_table(task.title, results(task, record)))
    console.print(as_table("Figures to reach", summary(tasks, recorded())))
    if options.records == RECORDS:
        write_page([load(RECORDS, name) for name in TASKS])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[], metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[], metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records (benchmarks/pinn/records)")
    clocks = [clock.value for clock in Seconds]
    parser.add_argument("--clock", choices=clocks, default=clocks[0], help="seconds on the wall, or of the processor")
    parser.add_argument("--short", action="store_true", help="one seed, a hundredth of every limit")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser


if __name__ == "__main__":
    main()
