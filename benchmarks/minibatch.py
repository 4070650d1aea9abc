"""What helps on mini-batches: NewtonKrylov.for_batches with parts of it exchanged, beside NewtonKrylov and Adam.

python benchmarks/minibatch.py            # three seeds, about ten minutes; writes the record, prints the table
python benchmarks/minibatch.py --table    # the table again, from the record
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imstep import NewtonKrylov
from imstep.bench.environment import environment
from imstep.bench.files import write_atomically
from imstep.globalization import LevenbergMarquardt, TaylorMonitor
from imstep.optim import BestRateForcing, ConjugateGradient, FixedProducts
from imstep.tasks import Batch, Problem, get_task
from record_page import table as in_markdown

RECORD = Path(__file__).resolve().parent / "records" / "minibatch.json"
BUDGET = 20.0
CASES = (("digits-mlp", 32), ("digits-mlp", 128), ("digits-autoencoder", 128))
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Side:
    """A configuration: what it is called, what makes the optimizer, which share of a batch the curvature sees."""

    name: str
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    part: float = 1.0


def _changed(name: str, **options: Any) -> Side:
    return Side(name, lambda parameters: NewtonKrylov.for_batches(parameters, **options))


SIDES = (
    _changed("for_batches"),
    _changed("no blend", solver=ConjugateGradient()),
    _changed("no floor under λ", damping=LevenbergMarquardt(initial=0.1)),
    _changed("1 product", forcing=FixedProducts(1)),
    _changed("4 products", forcing=FixedProducts(4)),
    _changed("products by best rate", forcing=BestRateForcing()),
    _changed("Taylor monitor", step=TaylorMonitor()),
    _changed("momentum", momentum=True),
    _changed("warm start, no blend", solver=ConjugateGradient(warm_start=0.5)),
    Side("curvature of half the batch", NewtonKrylov.for_batches, part=0.5),
    Side("curvature of a quarter", NewtonKrylov.for_batches, part=0.25),
    Side("NewtonKrylov, defaults", NewtonKrylov),
    Side("Adam, 3e-3", lambda parameters: torch.optim.Adam(parameters, lr=3e-3)),
)


def step(problem: Problem, optimizer: torch.optim.Optimizer, batch: Batch, part: float) -> float:
    """Take a step; its cost in gradients of the batch."""
    closure = problem.closure(batch)
    if not isinstance(optimizer, NewtonKrylov):
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
        return 1.0
    if part == 1.0:
        optimizer.step(closure)
        return optimizer.last_step.cost.gradient_equivalents
    optimizer.step(closure, problem.closure(batch.take(slice(0, round(part * len(batch))))))
    cost = optimizer.last_step.cost
    whole = cost.gradients + cost.losses / 3
    return whole + part * (cost.gradient_equivalents - whole)


def train(task: str, size: int, side: Side, seed: int) -> dict[str, list[float]]:
    """(training, held-out) loss of the last iterate and of the average, after the budget; float32."""
    problem = get_task(task).build(seed)
    optimizer = side.make(problem.parameters)
    average = AveragedModel(problem.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    cost, epoch = 0.0, 0
    while cost < BUDGET:
        for batch in problem.batches(epoch, size, seed):
            cost += step(problem, optimizer, batch, side.part) * len(batch) / len(problem.train)
            average.update_parameters(problem.model)
            if cost >= BUDGET:
                break
        epoch += 1
    look = lambda: [problem.evaluate(problem.train).loss, problem.evaluate(problem.heldout).loss]
    last = look()
    problem.model.load_state_dict(average.module.state_dict())
    return {"last": last, "average": look()}


def measure() -> Iterator[dict[str, Any]]:
    """One row a run."""
    for task, size in CASES:
        for side in SIDES:
            for seed in SEEDS:
                row = {"task": task, "batch": size, "side": side.name, "seed": seed, **train(task, size, side, seed)}
                print(row, flush=True)
                yield row


def table(rows: Sequence[dict[str, Any]], which: str = "average") -> str:
    """Medians over the seeds, training / held-out loss of the average or the last iterate, in Markdown."""
    heads = [f"{task}, {size}" for task, size in CASES]
    body = []
    for side in SIDES:
        cells = [side.name]
        for task, size in CASES:
            runs = [r for r in rows if (r["task"], r["batch"], r["side"]) == (task, size, side.name)]
            losses = zip(*(r[which] for r in runs), strict=True)
            cells.append(" / ".join(f"{statistics.median(values):.1e}" for values in losses))
        body.append(cells)
    return in_markdown(["", *heads], body)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the record, or show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only show the record")
    if not parser.parse_args(arguments).table:
        torch.set_num_threads(1)
        record = {"environment": environment(), "budget": BUDGET, "rows": list(measure())}
        write_atomically(RECORD, json.dumps(record, indent=1).encode())
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    print("average of the iterates", table(rows), "last iterate", table(rows, "last"), sep="\n\n")


if __name__ == "__main__":
    main()
