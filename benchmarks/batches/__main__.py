"""Training with batches of 32, 128, 512 and all examples, with the safeguards and without them.

python -m benchmarks.batches           # what the record lacks; writes record.json and docs/proofs.md
python -m benchmarks.batches --quick   # a smoke test; prints, writes nothing
python -m benchmarks.batches --table   # the page again, from the record
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from benchmarks.record_page import Row, complete, load, show, table
from benchmarks.termination.unguarded import Unguarded
from imstep.globalization import FixedStep, NoDamping
from imstep.optim import ExactHessian, NewtonKrylov, NonFiniteLossError
from imstep.tasks import get_task

NAME = "batches"
TASKS = ("digits-mlp", "digits-autoencoder", "digits-cnn")
BATCHES: tuple[int | None, ...] = (32, 128, 512, None)
SEEDS = range(5)
STEPS = 30
SIDES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "Hessian, with the safeguards": {"curvature": ExactHessian()},
    "defaults, no damping": {"damping": NoDamping()},
    "defaults, fixed step": {"step": FixedStep(1.0)},
    "defaults, neither": {"damping": NoDamping(), "step": FixedStep(1.0)},
    "Hessian, no termination": {"curvature": ExactHessian(), "solver": Unguarded()},
    "Hessian, none of the three": {
        "curvature": ExactHessian(),
        "solver": Unguarded(),
        "damping": NoDamping(),
        "step": FixedStep(1.0),
    },
}


def run(task: str, batch_size: int | None, side: str, seed: int, steps: int) -> dict[str, Any]:
    """The loss on examples that are never trained on, before the first step and after each."""
    problem = get_task(task).build(seed=seed)
    optimizer = NewtonKrylov(problem.parameters, **SIDES[side])
    heldout = [problem.evaluate(problem.heldout).loss]
    epoch, batches = 0, iter(())
    try:
        for _ in range(steps):
            batch = next(batches, None)
            if batch is None:
                batches = problem.batches(epoch, batch_size)
                batch, epoch = next(batches), epoch + 1
            optimizer.step(problem.closure(batch))
            heldout.append(problem.evaluate(problem.heldout).loss)
    except NonFiniteLossError:
        heldout.append(math.inf)
    highest = max(loss if math.isfinite(loss) else math.inf for loss in heldout[1:])
    return {
        "task": task,
        "batch": batch_size,
        "side": side,
        "seed": seed,
        "steps": len(heldout) - 1,
        "start": heldout[0],
        "highest": highest,
        "lowest": min(heldout),
        "last": heldout[-1],
        # Strictly: never above the start, at no step.
        "safe": highest < heldout[0],
        "cost": optimizer.cost.gradient_equivalents,
    }


def runs(seeds: Iterable[int], steps: int) -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    return {
        f"{task}; {batch}; {side}; {seed}": partial(run, task, batch, side, seed, steps)
        for task, batch, side, seed in itertools.product(TASKS, BATCHES, SIDES, seeds)
    }


def _cell(rows: list[dict[str, Any]]) -> str:
    over = statistics.median(float(r["highest"]) / r["start"] for r in rows)
    last = statistics.median(float(r["last"]) for r in rows)
    number = lambda x, digits: f"{x:.{digits}g}" if 1e-4 < abs(x) < 1e4 else f"{x:.0e}"
    return f"{sum(r['safe'] for r in rows)}/{len(rows)}, {number(over, 2)}, {number(last, 3)}"


def text_of(record: dict[str, Any]) -> str:
    """The tables of the page."""
    rows, parts = list(record["runs"].values()), []
    for task in dict.fromkeys(r["task"] for r in rows):
        of = lambda side, batch, task=task: [
            r for r in rows if (r["task"], r["side"], r["batch"]) == (task, side, batch)
        ]
        starts = statistics.median(r["start"] for r in rows if r["task"] == task)
        head = ["", *("all examples" if batch is None else f"batches of {batch}" for batch in BATCHES)]
        body = [[side, *(_cell(of(side, batch)) for batch in BATCHES)] for side in SIDES]
        parts += [f"**{task}**, {record['steps']} steps from a held-out loss of {starts:.3g}", table(head, body)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, one seed; prints, writes nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        print(text_of({"steps": 15, "runs": {key: run() for key, run in runs(SEEDS[:1], 15).items()}}))
        return
    about = {"steps": STEPS, "seeds": list(SEEDS)}
    show(NAME, "proofs", text_of(load(NAME) if arguments.table else complete(NAME, about, runs(SEEDS, STEPS))))


if __name__ == "__main__":
    main()
