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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.strength.page import write_page
from benchmarks.strength.peers import missing
from benchmarks.strength.record import add, load
from benchmarks.strength.run import limits_of, run_side, trial_limits, tune
from benchmarks.strength.sides import SIDES, Options, Side
from benchmarks.strength.table import as_table, results, verdicts
from benchmarks.strength.tasks import TASKS, TUNING_SEED, StrengthTask
from imstep.runs.progress import TrainingProgress
from imstep.runs.rows import Limits
from imstep.tasks import DataNotFoundError

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
SEEDS = (0, 1, 2, 3, 4)
QUICK = 0.01


@dataclass(frozen=True)
class Session:
    """What all runs of one call share."""

    console: Console
    records: Path
    data: Path | None
    scale: float

    def tuned(self, task: StrengthTask, side: Side) -> Options:
        """The side's setting, tuned now if that was not done yet."""
        limits, record = trial_limits(task, side, self.scale), load(self.records, task.name)
        sweep = record.sweep(side, task.name, limits.budget or 0.0)
        if sweep is None:
            with self._progress(f"{task.name}, {side.name}, tuning", limits) as progress:
                sweep = tune(task, side, self.scale, self.data, progress)
            add(self.records, task.name, sweep)
            tried = ", ".join(f"{row.options} {row.loss:.3g}" for row in sweep.rows)
            self.console.print(f"{task.name}, {side.name}: tuned on seed {TUNING_SEED}: {tried}", highlight=False)
        return sweep.chosen.options

    def run(self, task: StrengthTask, side: Side, seed: int) -> None:
        """Make the run unless the record has it."""
        limits, options = limits_of(task, side, self.scale), self.tuned(task, side)
        record = load(self.records, task.name)
        limit = {name: value for name, value in asdict(limits).items() if value is not None}
        if record.run(side.name, seed, options, limit) is not None:
            return
        with self._progress(f"{task.name}, {side.name}, seed {seed}", limits) as progress:
            run = run_side(task, side, options, seed, limits, self.data, progress)
        add(self.records, task.name, run)
        end = run.curve[-1]
        self.console.print(
            f"{task.name}, {side.name}, seed {seed}: train {end.train:.3e}, held-out {end.heldout:.3e}, "
            f"{end.cost:.0f} gradient-equivalents, {end.seconds:.0f} s",
            highlight=False,
        )

    def _progress(self, title: str, limits: Limits) -> TrainingProgress:
        return TrainingProgress(self.console, title, limits)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, make what is missing, show and write the tables."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console() if sys.stdout.isatty() else Console(width=130)
    session = Session(console, options.records, options.data, QUICK if options.quick else 1.0)
    tasks = [TASKS[name] for name in options.tasks or TASKS]
    try:
        for task in [] if options.table else tasks:
            seeds = [] if options.tune else options.seeds[:1] if options.quick else options.seeds
            _run_all(session, task, options.sides, seeds)
    except KeyboardInterrupt:
        console.print("Interrupted. Finished runs are kept; the same command goes on.")
        return
    for task in tasks:
        record = load(options.records, task.name)
        console.print(as_table(task.title, results(task, record, spread=False)))
        console.print(as_table(f"{task.title}: figures to reach", verdicts(task, record)))
    if options.records == RECORDS:
        write_page([load(RECORDS, name) for name in TASKS])


def _run_all(session: Session, task: StrengthTask, names: Sequence[str], seeds: Sequence[int]) -> None:
    sides = [SIDES[name] for name in task.sides if not names or name in names]
    absent = {side.name: missing(side.spec) for side in sides}
    for line in filter(None, dict.fromkeys(absent.values())):
        session.console.print(f"[yellow]left out:[/] {line}")
    sides = [side for side in sides if not absent[side.name]]
    try:
        for side in sides:
            session.tuned(task, side)
        # Seeds outside, so that the sides of one seed meet the machine in the same mood.
        for seed in seeds:
            for side in sides:
                session.run(task, side, seed)
    except DataNotFoundError as error:
        session.console.print(f"[yellow]left out:[/] {task.name}: {error}")


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
