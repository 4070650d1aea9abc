"""Training strength: imstep beside tuned Adam, L-BFGS, Muon, SOAP and SGD, loss by cost and by the clock.

python -m benchmarks.strength                                  # every task, side and seed that the records lack
python -m benchmarks.strength autoencoder --sides imstep soap  # some of them
python -m benchmarks.strength --tune                           # only the tuning that the records lack
python -m benchmarks.strength --table                          # the tables and the page again, from the records
python -m benchmarks.strength --quick --records /some/folder   # a smoke test of a few seconds

Finished runs are kept at once; the same command goes on after an interruption. To measure all seconds anew, on a
machine that does nothing else, delete the records (benchmarks/strength/records/*.json) or name another folder.

Muon and SOAP: pip install -c constraints.txt '.[peers]'. Fashion-MNIST: see docs/tasks.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.strength.page import write_page
from benchmarks.strength.record import load
from benchmarks.strength.session import QUICK, Session, run_all
from benchmarks.strength.sides import SIDES
from benchmarks.strength.table import as_table, results, verdicts
from benchmarks.strength.tasks import TASKS

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
SEEDS = (0, 1, 2, 3, 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, make what is missing, show and write the tables."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 130, emoji=False)
    session = Session(console, options.records, options.data, QUICK if options.quick else 1.0)
    tasks = [TASKS[name] for name in options.tasks or TASKS]
    try:
        for task in [] if options.table else tasks:
            seeds = [] if options.tune else options.seeds[:1] if options.quick else options.seeds
            run_all(session, task, SIDES, options.sides, seeds)
    except KeyboardInterrupt:
        console.print("Interrupted. Finished runs are kept; the same command goes on.")
        return
    for task in tasks:
        record = load(options.records, task.name)
        console.print(as_table(task.title, results(task, record, spread=False)))
        console.print(as_table(f"{task.title}: figures to reach", verdicts(task, record)))
    if options.records == RECORDS:
        write_page([load(RECORDS, name) for name in TASKS])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[], metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST; else $IMSTEP_DATA and the usual places")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (1)")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records (benchmarks/records)")
    parser.add_argument("--quick", action="store_true", help="one seed, a hundredth of every limit")
    parser.add_argument("--tune", action="store_true", help="tune and stop")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser


if __name__ == "__main__":
    main()
