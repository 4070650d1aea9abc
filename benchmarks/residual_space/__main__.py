"""Steps in residual space: how JJᵀ is factorised, how many corrections, and steps on a part of the residuals.

python -m benchmarks.residual_space           # what the record lacks; writes record.json and the tables
python -m benchmarks.residual_space --table   # the tables again, from the record

One thread, float64. Seconds are the processor's, without what only the record needs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record_page import Row, complete, load, show, table
from imstep import LeastSquares
from imstep.curvature import ResidualJacobian
from imstep.curvature.gradient_rows import PlainRows
from imstep.curvature.residual_jacobian import JacobianRows
from imstep.globalization import ContractionDamping
from imstep.linalg import (
    ByShape,
    DenseFactorisation,
    Factorisation,
    PivotedCholesky,
    RandomizedNystrom,
    RowMatrix,
    StepSpace,
)
from imstep.tasks import Batch, ExampleProblem, Problem, get_task
from imstep.tasks.models import mlp

NAME = "residual-space"
F64 = torch.float64


# --- problems -----------------------------------------------------------------------------------------------------


def convection(seed: int) -> Problem:
    """The convection task."""
    return get_task("convection-sobol").build(seed, dtype=F64)


def curve(seed: int) -> Problem:
    """Two sines."""
    x = torch.linspace(-1, 1, 300, dtype=F64)[:, None]
    batch = Batch(x, (3 * x).sin() + (12 * x).sin() / 2)
    torch.manual_seed(seed)
    return ExampleProblem("curve", mlp((1, 40, 40, 1)).to(F64), batch, batch, nn.MSELoss())


def digits(seed: int) -> Problem:
    """Which digit a picture shows, as a number."""
    source = get_task("digits-mlp").build(seed, dtype=F64)
    as_numbers = lambda batch: Batch(batch.inputs, (batch.targets[:, None].to(F64) - 4.5) / 3)
    torch.manual_seed(seed)
    model = mlp((64, 30, 1)).to(F64)
    return ExampleProblem("digits", model, as_numbers(source.train), as_numbers(source.heldout), nn.MSELoss())


@dataclass(frozen=True)
class Case:
    """A problem, the losses that are waited for, and the seconds after which they are not."""

    text: str
    make: Callable[[int], Problem]
    targets: tuple[float, ...]
    patience: float
    seeds: tuple[int, ...] = (0, 1, 2)


CASES = {
    "convection": Case(
        "that task, 2,228 residuals, 7,851 parameters; one start", convection, (1e-2, 1e-6, 1e-9), 120, seeds=(0,)
    ),
    "curve": Case(
        "sin 3x + sin(12x)/2 by 1-40-40-1, 300 residuals, 1,761 parameters; three starts",
        curve,
        (1e-4, 1e-8, 1e-12),
        5,
    ),
    "digits": Case(
        "a digit's value from its 64 pixels by 64-30-1, 1,500 residuals, 1,981 parameters; three starts",
        digits,
        (1e-1, 1e-2),
        40,
    ),
}
SIDES: dict[str, dict[str, Any]] = {
    "default: pivoted, dense beyond a third": {},
    "pivoted, however many": {"factorisation": PivotedCholesky(most=1)},
    "random Nyström": {"factorisation": RandomizedNystrom()},
    "dense": {"factorisation": DenseFactorisation()},
    "default, 8 corrections": {"corrections": 8},
    "default, 2 corrections": {"corrections": 2},
    "default, 1 correction": {"corrections": 1},
    "default, q of 0.3, at most 0.5": {"damping": ContractionDamping(target=0.3, limit=0.5)},
    "default, share 0.1": {"share": 0.1},
    "default, share 10": {"share": 10.0},
}
SUBSETS = (400, 800)
MOMENTA = (0.0, 0.8, 0.9)
LIMITS = [("seconds", 3), ("seconds", 6), ("seconds", 12), ("gradients", 60), ("gradients", 120), ("gradients", 240)]


# --- runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted(Factorisation):
    """A factorisation that keeps the rank of each."""

    inner: Factorisation
    ranks: list[int] = field(default_factory=list)

    def of(self, jacobian: RowMatrix, tolerance: float, draw: int) -> StepSpace:
        found = self.inner.of(jacobian, tolerance, draw)
        self.ranks.append(found.reduced.rank)
        return found


@dataclass(frozen=True)
class Moment:
    """What a run has come to: ``gradients`` are gradient-equivalents of all residuals, ``columns`` the mean rank."""

    loss: float
    steps: int
    evaluations: int
    columns: float
    gradients: float
    seconds: float


def steps(problem: Problem, options: dict[str, Any], batches: Iterator[Batch]) -> Iterator[Moment]:
    """Train, a step a batch; ``loss`` is that of the batch."""
    counted = Counted(options.get("factorisation", ByShape()))
    optimizer = LeastSquares(problem.parameters, **{**options, "factorisation": counted})
    seconds = gradients = 0.0
    for number, batch in enumerate(batches, 1):
        closure, started = problem.closure(batch), time.process_time()
        optimizer.step(closure)
        seconds += time.process_time() - started
        gradients += optimizer.last_step.cost.gradient_equivalents * len(batch) / len(problem.train)
        yield Moment(
            loss=optimizer.last_step.new_loss,
            steps=number,
            evaluations=optimizer.cost.losses,
            columns=fmean(counted.ranks),
            gradients=gradients,
            seconds=seconds,
        )


def passed(now: Moment, after: dict[str, float]) -> list[str]:
    """The limits that a run has passed since it was last asked."""
    keys = [f"{limit} {unit}" for unit, limit in LIMITS if getattr(now, unit) >= limit]
    return [key for key in keys if key not in after]


def to_targets(name: str, options: dict[str, Any], seed: int) -> Row:
    """Steps on all residuals until the loss is at the last target."""
    case = CASES[name]
    problem = case.make(seed)
    reached: dict[str, Row] = {}
    after: dict[str, float] = {}
    for now in steps(problem, options, repeat(problem.train)):
        reached |= {f"{t:g}": vars(now) for t in case.targets if now.loss <= t and f"{t:g}" not in reached}
        after |= dict.fromkeys(passed(now, after), now.loss)
        if len(reached) == len(case.targets) or now.seconds > case.patience:
            break
    held_out = problem.evaluate(problem.heldout).loss
    return {"end": vars(now), "held out": held_out, "reached": reached, "after": after}


def on_subsets(size: int, momentum: float, seed: int) -> Row:
    """Steps on the convection task's residuals, so many of them drawn anew for each."""
    problem, generator = convection(seed), torch.Generator().manual_seed(seed)
    draw = lambda: problem.train.take(torch.randperm(len(problem.train), generator=generator)[:size])
    after: dict[str, float] = {}
    for now in steps(problem, {"momentum": momentum}, iter(draw, None)):
        if keys := passed(now, after):
            after |= dict.fromkeys(keys, problem.evaluate(problem.train).loss)
        if len(after) == len(LIMITS):
            break
    return {"end": vars(now), "after": after}


def seconds_of(work: Callable[[], object]) -> float:
    """The least of three."""
    times = []
    for _ in range(3):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


PARTS: dict[str, Callable[[JacobianRows], Tensor]] = {
    "248 columns": lambda rows: rows.gram().columns(torch.linspace(0, rows.shape[0] - 1, 248).long()),
    "all": lambda rows: rows.gram().dense(),
}


def layer_wise() -> Row:
    """Columns of JJᵀ, and all of it, by the layers' factors and by rows written out; convection at the start."""
    problem = convection(0)
    by_layers = ResidualJacobian(problem.closure(problem.train), problem.parameters)
    count, size = by_layers.shape
    written_out = JacobianRows([PlainRows(by_layers.to_dense(limit=5000))], [size], count, by_layers.device)
    for work in PARTS.values():
        torch.testing.assert_close(work(by_layers), work(written_out), rtol=1e-8, atol=1e-8)
    return {
        f"{part}, {kind}": seconds_of(partial(work, rows))
        for kind, rows in (("layers", by_layers), ("rows", written_out))
        for part, work in PARTS.items()
    }


def runs() -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    return {
        "layer-wise": layer_wise,
        **{
            f"{name}; {side}; {seed}": partial(to_targets, name, options, seed)
            for name, case in CASES.items()
            for side, options in SIDES.items()
            for seed in case.seeds
            if (name, side) != ("convection", "pivoted, however many")  # where few do
        },
        **{
            f"subset {size}; {momentum}; {seed}": partial(on_subsets, size, momentum, seed)
            for size in SUBSETS
            for momentum in MOMENTA
            for seed in CASES["convection"].seeds
        },
    }


# --- tables -------------------------------------------------------------------------------------------------------


def stand(rows: list[Row], target: str) -> str:
    """Medians of steps, evaluations, columns and seconds of the runs that reached a target, and how many did not."""
    there = [r["reached"][target] for r in rows if target in r["reached"]]
    if not there:
        return f"none of {len(rows)}"
    steps, evaluations, columns, seconds = (
        median(r[key] for r in there) for key in ("steps", "evaluations", "columns", "seconds")
    )
    missing = f" ({len(there)} of {len(rows)})" if len(there) < len(rows) else ""
    return f"{steps:.0f} / {evaluations:.0f} / {columns:.0f} / {seconds:.2g}{missing}"


def losses(rows: list[Row], keys: list[str]) -> list[str]:
    """Medians after each limit."""
    return [f"{median(row['after'][key] for row in rows):.1e}" if rows else "-" for key in keys]


def text_of(record: dict[str, Any]) -> str:
    """The tables of the page."""
    made = record["runs"]
    of = lambda start: [row for key, row in made.items() if key.startswith(f"{start}; ")]
    parts = []
    for name, case in CASES.items():
        targets = [f"{t:g}" for t in case.targets]
        sides = {side: rows for side in SIDES if (rows := of(f"{name}; {side}"))}
        body = [[side, *(stand(rows, t) for t in targets)] for side, rows in sides.items()]
        parts += [f"**{name}** ({case.text}): steps / evaluations of residuals / mean columns / seconds to a loss of"]
        parts += [table(["", *targets], body)]
    keys = [f"{limit} {unit}" for unit, limit in LIMITS]
    parts += ["**convection**, loss over all residuals after so much on a part of them, drawn anew for each step:"]
    body = [["all", "0", *losses(of(f"convection; {next(iter(SIDES))}"), keys)]]
    for size in SUBSETS:
        for momentum in MOMENTA:
            rows = of(f"subset {size}; {momentum}")
            body.append([str(size), f"{momentum:g}", *losses(rows, keys)])
    parts += [table(["residuals", "momentum", *keys], body)]
    seconds = made["layer-wise"]
    body = [[part, *(f"{seconds[f'{part}, {kind}']:.3f}" for kind in ("layers", "rows"))] for part in PARTS]
    parts += ["**convection**, seconds for JJᵀ from the layers' factors, and from rows written out:"]
    parts += [table(["", "layer by layer", "written out"], body)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the tables from the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    show(NAME, "residual-space", text_of(load(NAME) if arguments.table else complete(NAME, {}, runs())))


if __name__ == "__main__":
    main()
