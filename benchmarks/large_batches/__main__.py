"""Steps to a loss on large batches: how accurate solves pay, what curvature between parameters is worth, and peers.

python -m benchmarks.large_batches           # what the record lacks, two hours for all; writes docs/mini-batches.md
python -m benchmarks.large_batches --table   # the page again, from the record

A character model of Shakespeare's plays (`imstep tasks`), 4,096 pieces; the last iterate's held-out loss, looked at
after every step. Peers have a constant rate, the best of three by these very runs.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.record_page import Row, command, table
from imstep import NewtonKrylov
from imstep.bench.peers import MuonAndAdamW
from imstep.methods import soap
from imstep.optim import BlockDiagonal, FixedProducts, PreconditionedMomentum
from imstep.tasks import get_task

NAME = "large-batches"
TASK, LEVELS, SEEDS, MOST = "shakespeare-small", (2.4, 2.2), (0, 1, 2), 200
SIZES, LARGEST = (256, 1024), 4096
Parameters = list[torch.nn.Parameter]
Maker = Callable[[Parameters, float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Side:
    """What is compared: a name, the optimizer for a rate, rates to choose from, and sizes of batches."""

    name: str
    make: Maker
    rates: tuple[float, ...] = (1.0,)
    sizes: tuple[int, ...] = SIZES


def ours(make: Callable[..., NewtonKrylov] = NewtonKrylov, **options: Any) -> Maker:
    """The optimizer with these options, for any rate."""
    return lambda parameters, rate: make(parameters, **options)


THIRTY = FixedProducts(30)
SIDES = (
    Side("`for_batches`: 2 products", ours(NewtonKrylov.for_batches)),
    Side("`NewtonKrylov()`: products as they pay", ours(), sizes=(*SIZES, LARGEST)),
    Side("the same with 30 products", ours(forcing=THIRTY)),
    Side("AdamW", lambda p, rate: torch.optim.AdamW(p, rate, weight_decay=0.0), (3e-3, 1e-2, 3e-2)),
    Side("Muon", MuonAndAdamW, (1e-2, 3e-2, 1e-1)),
    Side("SOAP", lambda p, rate: soap(p, lr=rate), (1e-2, 3e-2, 1e-1), (*SIZES, LARGEST)),
    Side("each parameter by itself, 30 iterations", ours(solver=BlockDiagonal(), forcing=THIRTY)),
)


def take(optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor]) -> float:
    """Take a step; what it cost in gradients."""
    if isinstance(optimizer, (NewtonKrylov, PreconditionedMomentum)):
        optimizer.step(closure)
        return optimizer.last_step.cost.gradient_equivalents
    optimizer.zero_grad()
    closure().backward()
    optimizer.step()
    return 1.0


def train(side: Side, size: int, rate: float, seed: int) -> Row:
    """Steps to the levels, infinity for not within `MOST`; and gradient-equivalents of a batch until then."""
    problem = get_task(TASK).build(seed)
    optimizer, cost, found = side.make(problem.parameters, rate), 0.0, {}
    batches = itertools.chain.from_iterable(problem.batches(epoch, size, seed) for epoch in itertools.count())
    for step, batch in enumerate(itertools.islice(batches, MOST), 1):
        cost += take(optimizer, problem.closure(batch))
        loss = problem.evaluate(problem.heldout).loss
        found |= {str(level): [step, cost] for level in LEVELS if loss <= level and str(level) not in found}
        if len(found) == len(LEVELS) or not loss < 10:
            break
    missed = {str(level): [str(math.inf)] * 2 for level in LEVELS if str(level) not in found}
    return {"side": side.name, "size": size, "rate": rate, "seed": seed, **found, **missed}


def runs() -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    return {
        f"{side.name}; {size}; {seed}; {rate:g}": partial(train, side, size, rate, seed)
        for side in SIDES
        for size, seed, rate in itertools.product(side.sizes, SEEDS, side.rates)
    }


def medians(rows: list[Row]) -> list[float]:
    """Of steps and gradient-equivalents to each level."""
    return [statistics.median(float(r[str(level)][at]) for r in rows) for level in LEVELS for at in (0, 1)]


def text_of(record: dict[str, Any]) -> str:
    """Medians over the seeds of steps and gradient-equivalents, at a peer's best rate, in Markdown."""
    body = []
    for size, side in sorted(((n, s) for s in SIDES for n in s.sizes), key=lambda pair: pair[0]):
        own = [r for r in record["runs"].values() if (r["side"], r["size"]) == (side.name, size)]
        found = [medians([r for r in own if r["rate"] == rate]) for rate in side.rates]
        best = min(found, key=lambda numbers: numbers[::-1])
        body.append([f"{size:,}", side.name, *(f"{n:,.0f}" if math.isfinite(n) else "never" for n in best)])
    head = ["batch", "steps by", *(f"{word} to {level}" for level in LEVELS for word in ("steps", "gradient-eq."))]
    return table(head, body)


if __name__ == "__main__":
    command(__doc__, NAME, "mini-batches", text_of, runs)
