"""Is NewtonKrylov.for_batches safe on small problems, and what do averages and decay do for held-out losses?

python -m benchmarks.small_problems           # what the record lacks, minutes for all; writes docs/mini-batches.md
python -m benchmarks.small_problems --table   # the page again, from the record
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.record_page import Row, command, table
from benchmarks.small_problems.problems import HELDOUT, PROBLEMS, Data, SmallProblem
from imstep import NewtonKrylov

NAME = "small-problems"
SEEDS = range(3)
Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
Way = tuple[str, float, Callable[[Row], float]]


SIDES: dict[str, Make] = {
    "for_batches": NewtonKrylov.for_batches,
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "defaults": NewtonKrylov,
}
DECAYS = (1e-2,)
DECAYED = ("for_batches", "AdamW")
HELDOUT_WAYS: dict[str, Way] = {
    "for_batches": ("for_batches", 0.0, lambda r: r["heldout"][-1]),
    "average": ("for_batches", 0.0, lambda r: r["average"][1]),
    "best epoch": ("for_batches", 0.0, lambda r: min(r["heldout"])),
    "λ = 0.01": ("for_batches", 1e-2, lambda r: r["heldout"][-1]),
    "λ = 0.01, average": ("for_batches", 1e-2, lambda r: r["average"][1]),
    "AdamW": ("AdamW", 0.0, lambda r: r["heldout"][-1]),
    "AdamW, λ = 0.01": ("AdamW", 1e-2, lambda r: r["heldout"][-1]),
    "defaults": ("defaults", 0.0, lambda r: r["heldout"][-1]),
    "defaults, average": ("defaults", 0.0, lambda r: r["average"][1]),
}


def evaluate(problem: SmallProblem, model: nn.Module, *sets: Data) -> list[float]:
    """The loss on each set, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        losses = [float(problem.loss(model(x), y)) for x, y in sets]
    model.train()
    return losses


def train(problem: SmallProblem, side: str, decay: float, seed: int) -> Row:
    """Training and held-out loss after every epoch, and of the average of iterates at the end; float32."""
    inputs, targets = problem.data(problem.examples + HELDOUT, torch.Generator().manual_seed(seed))
    n = problem.examples
    known, heldout = (inputs[:n], targets[:n]), (inputs[n:], targets[n:])
    torch.manual_seed(seed)
    model, order = problem.model(), torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    optimizer = SIDES[side](parameters)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    curve, cost = [evaluate(problem, model, known, heldout)], 0.0

    def loss(index: torch.Tensor) -> torch.Tensor:
        value = problem.loss(model(known[0][index]), known[1][index])
        return value + decay / 2 * sum(p.square().sum() for p in parameters) if decay else value

    for _ in range(problem.epochs):
        for index in torch.randperm(problem.examples, generator=order).split(problem.size):
            share = len(index) / problem.examples
            if isinstance(optimizer, NewtonKrylov):
                optimizer.step(partial(loss, index))
                cost += share * optimizer.last_step.cost.gradient_equivalents
            else:
                optimizer.zero_grad()
                loss(index).backward()
                optimizer.step()
                cost += share
            average.update_parameters(model)
        curve.append(evaluate(problem, model, known, heldout))
    averaged = evaluate(problem, average.module, known, heldout)
    known_losses, heldout_losses = zip(*curve, strict=True)
    about = {"problem": problem.name, "side": side, "decay": decay, "seed": seed, "cost": cost}
    return {**about, "train": known_losses, "heldout": heldout_losses, "average": averaged}


def loss_at(row: Row, cost: float) -> float:
    """The training loss of a run after a part of its cost; geometrically between the ends of epochs."""
    losses = row["train"]
    epoch = min(cost / row["cost"], 1.0) * (len(losses) - 1)
    before = min(int(epoch), len(losses) - 2)
    return float(losses[before] ** (before + 1 - epoch) * losses[before + 1] ** (epoch - before))


def runs() -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    ways = [(side, 0.0) for side in SIDES] + list(itertools.product(DECAYED, DECAYS))
    return {
        f"{problem.name}; {side}; {decay:g}; {seed}": partial(train, problem, side, decay, seed)
        for seed, (side, decay), problem in itertools.product(SEEDS, ways, PROBLEMS)
    }


def text_of(record: dict[str, Any]) -> str:
    """Medians over the seeds, in Markdown; without what was not measured at all."""
    rows = list(record["runs"].values())

    def values(problem: SmallProblem, way: Way) -> list[float]:
        side, decay, of = way
        made = [r for r in rows if (r["problem"], r["side"], r["decay"]) == (problem.name, side, decay)]
        return [float(of(r)) for r in made]

    def earlier(problem: SmallProblem) -> list[float]:
        """The loss of the defaults when they had cost as much as `for_batches` in all, seed by seed."""
        made = {(r["side"], r["seed"]): r for r in rows if r["problem"] == problem.name and not r["decay"]}
        return [
            loss_at(made["defaults", seed], row["cost"])
            for (side, seed), row in made.items()
            if side == "for_batches" and ("defaults", seed) in made
        ]

    def made_of(ways: dict[str, Way]) -> dict[str, Way]:
        return {name: way for name, way in ways.items() if any(values(problem, way) for problem in PROBLEMS)}

    def show_median(found: list[float]) -> str:
        worst = f" ({max(found):.3g})" if len(found) > 1 else ""
        return f"{statistics.median(found):.3g}{worst}" if found else "not measured"

    ways = made_of({side: (side, 0.0, lambda r: r["train"][-1]) for side in SIDES})
    body = [
        [problem.name, *(show_median(values(problem, way)) for way in ways.values()), show_median(earlier(problem))]
        for problem in PROBLEMS
    ]
    costs = {side: (side, 0.0, lambda r: r["cost"] / (len(r["train"]) - 1)) for side in ways}
    of_all = (itertools.chain(*(values(problem, way) for problem in PROBLEMS)) for way in costs.values())
    body.append(["gradients an epoch", *(f"{statistics.median(found):.1f}" for found in of_all)])
    body[-1].append("as many as for_batches")
    training = table(["training loss", *ways, "defaults, at that cost"], body)
    ways = made_of(HELDOUT_WAYS)
    body = [[problem.name, *(show_median(values(problem, way)) for way in ways.values())] for problem in PROBLEMS]
    return f"{training}\n\n{table(['held-out loss', *ways], body)}"


if __name__ == "__main__":
    command(__doc__, NAME, "mini-batches", text_of, runs)
