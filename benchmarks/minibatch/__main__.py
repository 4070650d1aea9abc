"""What helps on mini-batches: NewtonKrylov.for_batches with parts of it exchanged, beside NewtonKrylov and Adam.

python -m benchmarks.minibatch           # what the record lacks, twenty minutes for all; writes docs/mini-batches.md
python -m benchmarks.minibatch --table   # the page again, from the record

One of the cases is on Fashion-MNIST; `imstep train fashion-autoencoder` says how to get it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.minibatch.sides import SIDES, Side
from benchmarks.record_page import Row, command, table
from imstep import NewtonKrylov
from imstep.optim import GrowingBatches
from imstep.tasks import Batch, Problem, get_task

NAME = "minibatch"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """A task, examples of a batch, gradient-equivalents of the training set, examples of that (None for all)."""

    task: str
    size: int
    budget: float
    examples: int | None = None

    @property
    def name(self) -> str:
        return f"{self.task}, {self.size}; {self.budget:g}"


CASES = (
    Case("digits-mlp", 32, 20),
    Case("digits-mlp", 128, 20),
    Case("digits-autoencoder", 128, 20),
    Case("digits-autoencoder", 128, 100),
    Case("fashion-autoencoder", 512, 20, examples=10_000),
)
LAST = ("`for_batches`", "the base", "batches grow, θ = 1/2")
"""The sides whose last iterate is shown beside the average."""


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


def fixed(problem: Problem, size: int, seed: int) -> Iterator[Batch]:
    """Batches of one size, without end."""
    for epoch in itertools.count():
        yield from problem.batches(epoch, size, seed)


def growing(problem: Problem, sampler: GrowingBatches) -> Iterator[Batch]:
    """Batches of the size of the moment, without end."""
    while True:
        for index in sampler:
            yield problem.train.take(torch.tensor(index))


def train(case: Case, side: Side, seed: int) -> Row:
    """(training, held-out) loss of the last iterate and of the average, after the budget; float32."""
    problem = get_task(case.task).build(seed, examples=case.examples)
    optimizer = side.make(problem.parameters)
    average = AveragedModel(problem.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    sampler = None if side.test is None else GrowingBatches(len(problem.train), case.size, test=side.test, seed=seed)
    cost, steps = 0.0, 0
    for batch in fixed(problem, case.size, seed) if sampler is None else growing(problem, sampler):
        cost += step(problem, optimizer, batch, side.part) * len(batch) / len(problem.train)
        steps += 1
        average.update_parameters(problem.model)
        if sampler is not None:
            sampler.observe(optimizer.last_step, len(batch))
        if cost >= case.budget:
            break
    look = lambda: [problem.evaluate(problem.train).loss, problem.evaluate(problem.heldout).loss]
    last = look()
    problem.model.load_state_dict(average.module.state_dict())
    about = {"case": case.name, "side": side.name, "seed": seed, "steps": steps, "last_batch": len(batch)}
    return {**about, "last": last, "average": look()}


def runs() -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    return {
        f"{case.name}; {side.name}; {seed}": partial(train, case, side, seed)
        for case, side, seed in itertools.product(CASES, SIDES, SEEDS)
    }


def text_of(record: dict[str, Any]) -> str:
    """Medians over the seeds, training / held-out loss, in Markdown."""
    rows = list(record["runs"].values())

    def cells(side: Side, which: str) -> Iterator[str]:
        for case in CASES:
            made = [r[which] for r in rows if (r["case"], r["side"]) == (case.name, side.name)]
            if not made:
                yield "not measured"
                continue
            losses = zip(*made, strict=True)
            yield " / ".join(f"{statistics.median(values):.2e}".replace("e-0", "e-") for values in losses)

    body = []
    for side in SIDES:
        body.append([side.name, *cells(side, "average")])
        if side.name in LAST:
            body.append([f"{side.name}, last iterate instead of the average", *cells(side, "last")])
    return table(["", *(case.name for case in CASES)], body)


if __name__ == "__main__":
    command(__doc__, NAME, "mini-batches", text_of, runs)
