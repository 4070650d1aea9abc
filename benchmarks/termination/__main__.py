"""What ending the Krylov iteration at disturbing directions saves: products and loss at equal cost, with and without.

python -m benchmarks.termination           # what the record lacks; writes record.json and docs/proofs.md
python -m benchmarks.termination --quick   # a smoke test; prints, writes nothing
python -m benchmarks.termination --table   # the page again, from the record
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.record_page import Row, complete, load, show, table
from benchmarks.termination.unguarded import Unguarded, unguarded_solve
from imstep.globalization import NoDamping
from imstep.linalg import KrylovStatus, NoiseTest, ProductBudget, RelativeResidual, StoppingRule
from imstep.optim import (
    BestRateForcing,
    ConjugateGradient,
    ExactHessian,
    GaussNewtonFirst,
    NewtonKrylov,
    NewtonSystem,
    NoPreconditioning,
    ResidualForcing,
    Solver,
)
from imstep.optim.direction import Direction
from imstep.optim.forcing import Forcing, Situation
from imstep.tasks import get_task

NAME = "termination"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class FixedProducts(Forcing):
    """As many products in every step, unless the system is solved to the last digit."""

    products: int

    def rules(self, situation: Situation) -> tuple[StoppingRule, ...]:
        return RelativeResidual(1e-6), ProductBudget(self.products)


MATRICES = {"Hessian": ExactHessian(), "Gauss-Newton": GaussNewtonFirst(close=0)}
TERMINATIONS: dict[str, Solver] = {
    "off": Unguarded(),
    "negative curvature": ConjugateGradient(),
    "and noise, z = 1": ConjugateGradient(noise=NoiseTest(z=1.0)),
    "and noise, z = 2": ConjugateGradient(noise=NoiseTest(z=2.0)),
}
FORCINGS = {
    "best rate": BestRateForcing(),
    "residual": ResidualForcing(),
    "10 products": FixedProducts(10),
}
FRAMES: dict[str, dict[str, Any]] = {
    "plain": {"preconditioning": NoPreconditioning(), "damping": NoDamping()},
    "default": {},
}


@dataclass(frozen=True)
class Setting:
    """A task, a batch size (None for all examples) and a budget in gradients on all examples."""

    task: str
    batch: int | None
    budget: float


@dataclass(frozen=True)
class Side:
    """A configuration of the optimizer, by the words of the tables."""

    frame: str
    matrix: str
    termination: str
    forcing: str

    def optimizer(self, parameters: Iterable[torch.nn.Parameter], solver: Solver | None = None) -> NewtonKrylov:
        return NewtonKrylov(
            parameters,
            curvature=MATRICES[self.matrix],
            solver=solver or TERMINATIONS[self.termination],
            forcing=FORCINGS[self.forcing],
            **FRAMES[self.frame],
        )


SETTINGS = (
    Setting("digits-autoencoder", None, 150.0),
    Setting("digits-autoencoder", 150, 25.0),
    Setting("digits-mlp", None, 100.0),
    Setting("digits-mlp", 150, 25.0),
    Setting("digits-cnn", 150, 20.0),
)


def sides(setting: Setting) -> list[Side]:
    """All that differ: Gauss-Newton is never negative, and a batch of all examples has no noise."""
    noise = [] if setting.batch is None else ["and noise, z = 1", "and noise, z = 2"]
    terminations = {"Hessian": ["off", "negative curvature", *noise], "Gauss-Newton": ["off", *noise[1:]]}
    return [
        Side(frame, matrix, termination, forcing)
        for frame in FRAMES
        for matrix, some in terminations.items()
        for forcing in FORCINGS
        for termination in some
    ]


# --- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Avoided(Solver):
    """Terminates at disturbing directions, and counts what going on would have cost.

    Attributes:
        spent, more: products of each terminated iteration, and those that the stopping rules would have gone on to.
    """

    spent: list[int] = field(default_factory=list)
    more: list[int] = field(default_factory=list)

    def solve(self, system: NewtonSystem) -> Direction:
        direction = ConjugateGradient().solve(system)
        if direction.status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE:
            made = system.operator.products
            without = unguarded_solve(system).products
            system.operator.products = made  # these are not the step's
            self.spent.append(direction.iterations + 1)
            self.more.append(max(without - direction.iterations - 1, 0))
        return direction


def run(setting: Setting, side: Side, seed: int, solver: Solver | None = None) -> dict[str, Any]:
    """A run until the budget is spent; the loss is that of the last step within it."""
    problem = get_task(setting.task).build(seed=seed)
    optimizer = side.optimizer(problem.parameters, solver)
    batches = problem.batch_count(setting.batch)
    start = loss = problem.evaluate(problem.train).loss
    products, steps, epoch, ends, spent, worst = 0, 0, 0, Counter[str](), 0.0, start
    while spent < setting.budget:
        for batch in problem.batches(epoch, setting.batch):
            optimizer.step(problem.closure(batch))
            record, spent = optimizer.last_step, optimizer.cost.gradient_equivalents / batches
            if spent >= setting.budget:
                break
            steps, products = steps + 1, products + record.cost.products
            ends[str(record.status)] += 1
            if setting.batch is None:
                loss = record.new_loss
        epoch += 1
        if setting.batch is not None:
            loss = problem.evaluate(problem.train).loss
        worst = max(worst, loss)
    heldout = problem.evaluate(problem.heldout).loss
    return {
        **asdict(setting),
        **asdict(side),
        "seed": seed,
        "start": start,
        "loss": loss,
        "heldout": heldout,
        "worst": worst,
        "steps": steps,
        "products": products,
        "ends": dict(ends),
    }


def count_avoided(setting: Setting, side: Side, seed: int) -> dict[str, Any]:
    """A run with termination that counts, at every end by negative curvature, what going on would have cost."""
    counting = Avoided()
    row = run(setting, side, seed, counting)
    ended = row["ends"].get("disturbing_negative_curvature", 0)  # the last step of all is beyond the budget
    spent, more = sum(counting.spent[:ended]), sum(counting.more[:ended])
    return {**row, "ended": ended, "spent_when_ended": spent, "avoided": more}


def runs(settings: Iterable[Setting], seeds: Iterable[int]) -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    made: dict[str, Callable[[], Row]] = {}
    for setting, seed in itertools.product(settings, seeds):
        for side in sides(setting):
            name = "; ".join(map(str, (setting.task, setting.batch, *asdict(side).values(), seed)))
            made[name] = partial(run, setting, side, seed)
            if (side.matrix, side.termination) == ("Hessian", "negative curvature"):
                made[f"{name}; avoided"] = partial(count_avoided, setting, side, seed)
    return made


# --- tables ---------------------------------------------------------------------------------------------------------


def geometric(values: Iterable[float]) -> float:
    logs = [math.log(v) if v > 0 else math.nan for v in values]
    return math.exp(statistics.fmean(logs))


def _title(row: dict[str, Any]) -> str:
    batch = "all examples" if row["batch"] is None else f"batches of {row['batch']}"
    return f"{row['task']}, {batch}, {row['budget']:g} gradients"


def _cell(rows: list[dict[str, Any]]) -> str:
    ended = sum(n for r in rows for word, n in r["ends"].items() if word.startswith("disturbing"))
    steps = sum(r["steps"] for r in rows)
    if not steps:
        return "no step within the budget"
    per_step = sum(r["products"] for r in rows) / steps
    return f"{geometric(r['loss'] for r in rows):.2e} ({per_step:.1f}, {100 * ended / steps:.0f} %)"


def text_of(record: dict[str, Any]) -> str:
    """The tables of the page."""
    rows = [r for r in record["runs"].values() if "avoided" not in r]
    parts = []
    for title in dict.fromkeys(map(_title, rows)):
        some = [r for r in rows if _title(r) == title]
        keys = list(dict.fromkeys((r["frame"], r["matrix"], r["termination"]) for r in some))
        of = lambda key, forcing, some=some: [
            r for r in some if (r["frame"], r["matrix"], r["termination"]) == key and r["forcing"] == forcing
        ]
        body = [[*key, *(_cell(of(key, forcing)) for forcing in FORCINGS)] for key in keys]
        parts += [f"**{title}**", table(["frame", "matrix", "termination", *FORCINGS], body)]
    parts += ["**What termination avoided**", _avoided_table([r for r in record["runs"].values() if "avoided" in r])]
    return "\n\n".join(parts)


def _avoided_table(rows: list[dict[str, Any]]) -> str:
    keys = dict.fromkeys((_title(r), r["frame"], r["forcing"]) for r in rows)
    body = []
    for key in keys:
        some = [r for r in rows if (_title(r), r["frame"], r["forcing"]) == key]
        total = lambda name, some=some: sum(r[name] for r in some)
        ended = total("ended")
        body.append(
            [
                *key,
                f"{ended} of {total('steps')}",
                f"{total('spent_when_ended') / max(ended, 1):.1f}",
                f"{total('avoided') / max(ended, 1):.1f}",
                f"{100 * total('avoided') / max(total('avoided') + total('products'), 1):.0f} %",
            ]
        )
    head = ["run", "frame", "forcing", "steps ended", "products spent in each", "avoided in each", "of all products"]
    return table(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny budgets, one seed; prints, writes nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        short = runs([Setting(s.task, s.batch, s.budget / 10) for s in SETTINGS], SEEDS[:1])
        print(text_of({"runs": {key: run() for key, run in short.items()}}))
        return
    about = {"seeds": SEEDS}
    show(NAME, "proofs", text_of(load(NAME) if arguments.table else complete(NAME, about, runs(SETTINGS, SEEDS))))


if __name__ == "__main__":
    main()
