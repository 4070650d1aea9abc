"""Terms of a loss balanced by a rule: when does it pay?

python -m benchmarks.balancing           # what the record lacks; writes record.json and the page
python -m benchmarks.balancing --table   # the page again, from the record

Small versions of four tasks, whose losses are sums of two to four terms; float64, one thread, 300 points a step. Steps
and gradient-equivalents are counted, not seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn

from benchmarks.record_page import Row, command, table
from imstep import LeastSquares
from imstep.optim import Balancing, EqualGradients, EqualTraces
from imstep.tasks import PhysicsTask, get_task
from imstep.tasks.models import mlp

NAME = "balancing"
POINTS, STEPS, SEEDS = 300, 45, (0, 1, 2)
CASES: dict[str, tuple[int, ...]] = {
    "poisson-2d": (2, 32, 1),
    "burgers": (2, 16, 16, 16, 1),
    "reaction": (2, 24, 24, 1),
    "wave": (2, 24, 24, 1),
}
RULES: dict[str, Balancing | None] = {
    "none": None,
    "equal traces": EqualTraces(),
    "equal gradients": EqualGradients(),
}


def run(name: str, rule: str, seed: int) -> Row:
    """Errors after each third of the steps, the last step's weights, and gradient-equivalents."""
    task = get_task(name)
    assert isinstance(task, PhysicsTask)
    network: Callable[[], nn.Module] = partial(mlp, CASES[name])
    problem = replace(task, network=network).build(seed, dtype=torch.float64, examples=POINTS)
    optimizer, errors = LeastSquares(problem.parameters, balance=RULES[rule]), []
    for step in range(STEPS):
        for points in problem.batches(step, seed=seed):
            optimizer.step(problem.closure(points))
        if (step + 1) % (STEPS // 3) == 0:
            errors.append(float(f"{problem.evaluate(problem.heldout).loss:.3g}"))
    weights = [float(f"{weight:.3g}") for weight in optimizer.last_step.weights]
    return {"errors": errors, "weights": weights, "gradients": round(optimizer.cost.gradient_equivalents)}


def runs() -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    return {
        f"{name}; {rule}; {seed}": partial(run, name, rule, seed) for name in CASES for seed in SEEDS for rule in RULES
    }


def text_of(record: dict[str, Any]) -> str:
    """A row for each problem and rule: geometric means over the starts, and the errors of each at the end."""
    body = []
    for name in CASES:
        for rule in RULES:
            rows = [record["runs"][f"{name}; {rule}; {seed}"] for seed in SEEDS]
            means = [geometric_mean([row["errors"][at] for row in rows]) for at in range(3)]
            each = ", ".join(f"{row['errors'][-1]:.1e}" for row in rows)
            gradients = f"{geometric_mean([row['gradients'] for row in rows]):.0f}"
            body.append([name, rule, *(f"{mean:.1e}" for mean in means), each, gradients])
    heads = [f"error after {(at + 1) * STEPS // 3}" for at in range(3)]
    return table(["problem", "rule", *heads, "of each start", "gradients"], body)


if __name__ == "__main__":
    command(__doc__, NAME, "balancing", text_of, runs)
