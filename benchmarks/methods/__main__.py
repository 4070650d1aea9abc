"""Every method of `imstep.methods` on six small problems: the same start, the same budget, three settings each.

python -m benchmarks.methods                       # what the record lacks, about an hour; writes docs/methods.md
python -m benchmarks.methods --table               # the page again, from the record
python -m benchmarks.methods --only RNN --methods kfac adam --share 0.1   # prints, writes nothing

A run goes on until it has spent its gradient-equivalents and its seconds; its training loss is taken where the one and
where the other was spent. Methods with a rate, and those for mini-batches, see batches where there are examples.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.methods.page import text_of
from benchmarks.methods.problems import SUBJECTS, Subject
from benchmarks.methods.settings import CONTESTANTS, settings
from benchmarks.record_page import Row, complete, load, show
from imstep.optim import NonFiniteLossError
from imstep.runs.optimizers import get_optimizer
from imstep.runs.rows import Clock, Ending, EvaluationRow, Limits, Schedule
from imstep.runs.runner import Trainer
from imstep.runs.suitability import REFUSALS

NAME = "methods"
EVALUATIONS = 20
MOST_SECONDS = 8.0
"""Of a run that is slow for its gradient-equivalents; it then counts as far as it has come, with a star."""

TOO_LARGE = {("autoencoder", "least-squares"), ("RNN", "least-squares")}
"""More than 1,000 residuals with as many parameters; these are not run."""


@dataclass
class Ends:
    """The lowest training loss so far, within a budget; infinite where not one step was."""

    loss: float = math.inf
    heldout: float = math.nan

    def take(self, row: EvaluationRow) -> None:
        if row.train_loss < self.loss:
            self.loss, self.heldout = row.train_loss, row.heldout_loss


def run(subject: Subject, name: str, label: str) -> Row:
    """One run."""
    about = {"problem": subject.name, "method": name, "setting": label}
    if (subject.name, name) in TOO_LARGE:
        return {**about, "refused": "a step takes minutes"}
    problem = subject.task.build(0, dtype=subject.dtype)
    spec = get_optimizer(name)
    batch = subject.batch if spec.learning_rates or spec.mini_batches else None
    try:
        trainer = Trainer(
            problem,
            settings(name)[label](problem),
            batch_size=batch,
            schedule=Schedule(subject.budget / EVALUATIONS, Clock.COST),
        )
        by_cost, by_time, end = _follow(trainer, subject)
    except REFUSALS as error:
        return {**about, "refused": str(error)}
    least, totals = subject.least(), trainer.totals
    return {
        **about,
        "batch": batch,
        "loss": by_cost.loss - least,
        "heldout": by_cost.heldout,
        "loss_in_time": by_time.loss - least,
        "cost": round(totals.cost, 1),
        "seconds": round(totals.seconds, 2),
        "steps": totals.steps,
        "end": end,
    }


def _follow(trainer: Trainer, subject: Subject) -> tuple[Ends, Ends, str]:
    """Train until budget and seconds are both spent; the losses where each was."""
    by_cost, by_time = Ends(), Ends()
    try:
        for row in trainer.run(Limits(seconds=MOST_SECONDS)):
            if isinstance(row, EvaluationRow) and row.step > 0:
                if row.cost <= subject.budget * (1 + 1e-9):
                    by_cost.take(row)
                if row.seconds <= subject.seconds:
                    by_time.take(row)
            if row.cost >= subject.budget and row.seconds >= subject.seconds:
                return by_cost, by_time, "budget"
    except NonFiniteLossError:
        return by_cost, by_time, Ending.DIVERGED.name.lower()
    assert trainer.ending is not None
    return by_cost, by_time, trainer.ending.name.lower()


def runs(subjects: Iterable[Subject], names: Iterable[str]) -> dict[str, Callable[[], Row]]:
    """Every method with each of its settings on every problem."""
    return {
        f"{subject.name}; {name}; {label}": partial(run, subject, name, label)
        for subject in subjects
        for name in names
        for label in settings(name)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    parser.add_argument("--only", nargs="+", metavar="PROBLEM", choices=[s.name for s in SUBJECTS])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", choices=CONTESTANTS)
    parser.add_argument("--share", type=float, default=1.0, help="of budgets and seconds, for a trial")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subjects = [s for s in SUBJECTS if arguments.only is None or s.name in arguments.only]
    names = arguments.methods or CONTESTANTS
    if len(subjects) < len(SUBJECTS) or len(names) < len(CONTESTANTS) or arguments.share != 1:
        share = arguments.share
        part = [replace(s, budget=share * s.budget, seconds=share * s.seconds) for s in subjects]
        made = {}
        for key, make in runs(part, names).items():
            made[key] = make()
            print(made[key], flush=True)
        print(text_of({"runs": made}))
        return
    every = runs(SUBJECTS, CONTESTANTS)
    record: Mapping[str, Any] = load(NAME) if arguments.table else complete(NAME, _about(), every)
    show(NAME, "methods", text_of(record))


def _about() -> dict[str, Any]:
    return {"budgets": {s.name: s.budget for s in SUBJECTS}, "seconds": {s.name: s.seconds for s in SUBJECTS}}


if __name__ == "__main__":
    main()
