"""Steps to a loss on large batches: how accurate solves pay, and what curvature between parameters is worth.

python -m benchmarks.large_batches           # what the record lacks, an hour for all; writes docs/mini-batches.md
python -m benchmarks.large_batches --table   # the page again, from the record

A character model of Shakespeare's plays (`imstep tasks`), 4,096 pieces; the last iterate's held-out loss, looked at
after every step. Peers by the same batches are in docs/bench.md.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.record_page import Row, command, table
from imstep import NewtonKrylov
from imstep.optim import BlockDiagonal, FixedProducts
from imstep.tasks import get_task

NAME = "large-batches"
TASK, LEVELS, SEEDS, MOST = "shakespeare-small", (2.4, 2.2), (0, 1, 2), 120


@dataclass(frozen=True)
class Side:
    """What is compared: a name, the optimizer, and the batch sizes at which it can be had in minutes."""

    name: str
    make: Callable[[Iterable[torch.nn.Parameter]], NewtonKrylov]
    sizes: tuple[int, ...] = (256, 1024)


THIRTY = FixedProducts(30)
SIDES = (
    Side("`for_batches`: 2 products", NewtonKrylov.for_batches),
    Side("`NewtonKrylov()`: products as they pay", NewtonKrylov, (256, 1024, 4096)),
    Side("the same with 30 products", partial(NewtonKrylov, forcing=THIRTY)),
    Side("each parameter by itself, 30 iterations", partial(NewtonKrylov, solver=BlockDiagonal(), forcing=THIRTY)),
)


def train(side: Side, size: int, seed: int) -> Row:
    """Steps to the levels, infinity for not within `MOST`; and gradient-equivalents of a batch until then."""
    problem = get_task(TASK).build(seed)
    optimizer = side.make(problem.parameters)
    found: Row = {}
    batches = itertools.chain.from_iterable(problem.batches(epoch, size, seed) for epoch in itertools.count())
    for step, batch in enumerate(itertools.islice(batches, MOST), 1):
        optimizer.step(problem.closure(batch))
        loss = problem.evaluate(problem.heldout).loss
        reached = [level for level in LEVELS if loss <= level and str(level) not in found]
        found |= {str(level): [step, optimizer.cost.gradient_equivalents] for level in reached}
        if len(found) == len(LEVELS):
            break
    missed = {str(level): [str(math.inf)] * 2 for level in LEVELS if str(level) not in found}
    return {"side": side.name, "size": size, "seed": seed, **found, **missed}


def runs() -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    return {
        f"{side.name}; {size}; {seed}": partial(train, side, size, seed)
        for side in SIDES
        for size, seed in itertools.product(side.sizes, SEEDS)
    }


def text_of(record: dict[str, Any]) -> str:
    """Medians over the seeds of steps and gradient-equivalents, in Markdown."""
    body = []
    for size, side in sorted(((n, s) for s in SIDES for n in s.sizes), key=lambda pair: pair[0]):
        rows = [r for r in record["runs"].values() if (r["side"], r["size"]) == (side.name, size)]
        cells = [f"{size:,}", side.name]
        for level in LEVELS:
            steps, cost = (statistics.median(float(r[str(level)][at]) for r in rows) for at in (0, 1))
            cells += [f"{steps:.0f}", f"{cost:,.0f}"] if math.isfinite(steps) else ["never", "never"]
        body.append(cells)
    head = ["batch", "solve", *(f"{word} to {level}" for level in LEVELS for word in ("steps", "gradient-eq."))]
    return table(head, body)


if __name__ == "__main__":
    command(__doc__, NAME, "mini-batches", text_of, runs)
