"""Preconditioners of NewtonKrylov side by side: loss by cost on two small tasks, everything else at its default.

python -m benchmarks.preconditioners            # three seeds, about ten minutes; writes the record, prints the table
python -m benchmarks.preconditioners --table    # the table again, from the record
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.record_page import table as in_markdown
from imstep import NewtonKrylov
from imstep.optim import Hutchinson, Kronecker, NoPreconditioning, Nystrom, Recycling, SquaredGradients
from imstep.optim.preconditioning import Preconditioning
from imstep.runs.environment import environment
from imstep.runs.files import write_atomically
from imstep.tasks import get_task

RECORD = Path(__file__).resolve().parent / "record.json"
SIDES: tuple[Preconditioning, ...] = (
    NoPreconditioning(),
    SquaredGradients(),
    Hutchinson(),
    Nystrom(rank=10, every=10),
    Kronecker(),
    Recycling(NoPreconditioning()),
    Recycling(),
)
BUDGETS = {"digits-autoencoder": (100, 300), "digits-cnn": (50, 150)}
SEEDS = (0, 1, 2)


def train(task: str, side: Preconditioning, seed: int) -> list[float]:
    """The training loss at each of the task's budgets, full batch, float32."""
    torch.manual_seed(seed)
    problem = get_task(task).build(seed, device=torch.device("cpu"), dtype=torch.float32)
    optimizer = NewtonKrylov(problem.parameters, preconditioning=side)
    closure, losses = problem.closure(problem.train), []
    for budget in BUDGETS[task]:
        while optimizer.cost.gradient_equivalents < budget:
            optimizer.step(closure)
        losses.append(optimizer.last_step.new_loss)
    return losses


def measure() -> Iterator[dict[str, object]]:
    """One row a run."""
    for task in BUDGETS:
        for side in SIDES:
            for seed in SEEDS:
                row = {"task": task, "side": repr(side), "seed": seed, "losses": train(task, side, seed)}
                print(row)
                yield row


def table(rows: Sequence[dict[str, object]]) -> str:
    """Medians over the seeds, in Markdown."""
    heads = [f"{task}, {budget}" for task, budgets in BUDGETS.items() for budget in budgets]
    body = []
    for side in map(repr, SIDES):
        cells = []
        for task in BUDGETS:
            runs = [row["losses"] for row in rows if (row["task"], row["side"]) == (task, side)]
            cells += [f"{statistics.median(losses):.2e}" for losses in zip(*runs, strict=True)]
        body.append([f"`{side}`", *cells])
    return in_markdown(["preconditioning", *heads], body)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the record, or show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only show the record")
    if not parser.parse_args(arguments).table:
        torch.set_num_threads(1)
        record = {"environment": environment(), "budgets": BUDGETS, "rows": list(measure())}
        write_atomically(RECORD, json.dumps(record, indent=1).encode())
    print(table(json.loads(RECORD.read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()
