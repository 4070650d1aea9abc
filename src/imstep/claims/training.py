"""Training: mini-batches that do not contaminate, and how it compares with tuned peers, in both currencies."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from imstep.claims.claim import Figure, at_least, at_most
from imstep.runs.optimizers import get_optimizer
from imstep.runs.rows import Clock, EvaluationRow, Limits, Schedule
from imstep.runs.runner import Trainer
from imstep.tasks import Task, get_task

__all__ = ["faster", "mini_batches", "outperforms"]

Curve = list[EvaluationRow]


def _curve(
    task: Task,
    optimizer: str,
    options: Mapping[str, float],
    budget: float,
    batch_size: int | None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Curve:
    """Evaluations of a run within the budget."""
    problem = task.build(seed, dtype=dtype)
    stepper = get_optimizer(optimizer).create(problem, **options)
    trainer = Trainer(
        problem, stepper, batch_size=batch_size, seed=seed, schedule=Schedule(budget / 40, Clock.COST)
    )
    rows = trainer.run(Limits(budget=budget))
    return [row for row in rows if isinstance(row, EvaluationRow) and row.cost <= budget * 1.05]


def _best(curve: Curve) -> float:
    return min((row.train_loss for row in curve if math.isfinite(row.train_loss)), default=math.inf)


def _tuned(task: Task, peers: Mapping[str, Sequence[float]], budget: float, batch_size: int | None) -> Curve:
    """The run with the lowest training loss, of every peer at every rate."""
    tried = [(name, rate) for name, rates in peers.items() for rate in rates]
    return min((_curve(task, name, {"lr": rate}, budget, batch_size) for name, rate in tried), key=_best)


def mini_batches() -> Sequence[Figure]:
    """Batches of 32 digits: `for_batches` beside the full-batch configuration on the same batches, three seeds."""
    task, budget = get_task("digits-mlp"), 8.0
    ours = [_curve(task, "newton-krylov-batches", {}, budget, 32, seed) for seed in range(3)]
    plain = [_curve(task, "newton-krylov", {}, budget, 32, seed) for seed in range(3)]
    ends, others = ([curve[-1].heldout_loss for curve in curves] for curves in (ours, plain))
    # A held-out loss that goes up from one look to the next is what contamination looks like.
    rises = max(b.heldout_loss / a.heldout_loss for curve in ours for a, b in pairwise(curve[4:]))
    return [
        at_most(
            "held-out loss / plain Newton-Krylov's, median", statistics.median(ends) / statistics.median(others), 0.9
        ),
        at_most("held-out loss at the end / at the start, worst seed", max(ends) / ours[0][0].heldout_loss, 0.15),
        at_most("largest rise of the held-out loss between looks, factor", rises, 1.3),
    ]


def outperforms() -> Sequence[Figure]:
    """The digits autoencoder: the lowest training loss within 100 gradients beside tuned SGD, Adam and L-BFGS."""
    task, budget = get_task("digits-autoencoder"), 100.0
    peers: dict[str, Sequence[float]] = {"adam": (3e-3, 1e-2), "sgd": (1.0,)}
    whole = _tuned(task, {**peers, "lbfgs": (1.0,)}, budget, None)
    parts = _tuned(task, peers, budget, 150)
    full = _curve(task, "newton-krylov", {}, budget, None)
    batches = _curve(task, "newton-krylov-batches", {}, budget, 150)
    return [
        at_most("training loss / the best peer's, full batch", _best(full) / _best(whole), 0.8),
        at_most("training loss / the best peer's, batches of 150", _best(batches) / _best(parts), 0.9),
    ]


def faster() -> Sequence[Figure]:
    """Poisson's equation at fixed points, float64: to our loss after 100 gradients, of peers with ten times as many."""
    task, budget = replace(get_task("poisson-2d"), redrawn=False), 100.0  # type: ignore[call-arg]
    ours = min(_curve(task, "least-squares", {}, budget, None, dtype=torch.float64), key=lambda row: row.train_loss)
    peers = [
        _curve(task, name, {"lr": rate}, 10.5 * budget, None, dtype=torch.float64)
        for name, rate in (("soap", 1e-2), ("lbfgs", 1.0))
    ]
    # A peer that never comes there would take longer than its whole run.
    there = [next((row for row in rows if row.train_loss <= ours.train_loss), rows[-1]) for rows in peers]
    return [
        at_least("gradients of the best peer / ours", min(row.cost for row in there) / ours.cost, 7.0),
        at_least("seconds of the best peer / ours", min(row.seconds for row in there) / ours.seconds, 1.5),
    ]
