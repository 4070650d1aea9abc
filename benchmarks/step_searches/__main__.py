"""Step searches of `minimize` on the functions of Moré, Garbow and Hillstrom: what they cost, and where they arrive.

python -m benchmarks.step_searches           # what the record lacks; writes it and docs/step-lengths.md
python -m benchmarks.step_searches --only 1  # functions by number; prints, writes nothing
python -m benchmarks.step_searches --table   # the page again, from the record

The smallest size of each function, from the standard start, ten and a hundred times that, with the tests that minimize
has by default and 200 steps at most. Counts do not depend on the machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

import imstep
from benchmarks.more_garbow_hillstrom.problems import FUNCTIONS, SumOfSquares
from benchmarks.record_page import Row, complete, load, show, table
from imstep.globalization import Armijo, NoDamping, StrongWolfe, TaylorMonitor, TrustRegion
from imstep.optim import SteihaugToint

NAME = "step-searches"
STEPS = 200
FACTORS = (1, 10, 100)
DEFAULT = "Armijo, forward"
SIDES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "Armijo": {"step": Armijo(), "max_trials": 12},
    "strong Wolfe": {"step": StrongWolfe(), "max_trials": 12},
    "Taylor monitor, theta 0.25": {"step": TaylorMonitor(), "max_trials": 12},
    "Taylor monitor, theta 0.9": {"step": TaylorMonitor(theta=0.9), "max_trials": 12},
    "trust region": {"step": TrustRegion(), "solver": SteihaugToint(), "damping": NoDamping(), "max_trials": 12},
}


def run(function: SumOfSquares, factor: int, side: str) -> Row:
    """One minimisation."""
    result = imstep.minimize(function, function.start_at(float(factor)), maxiter=STEPS, **SIDES[side])
    return {
        "function": f"{function.number} {function.name}",
        "factor": factor,
        "side": side,
        "end": result.termination.name.lower(),
        "success": result.success,
        "published": any(abs(result.fun - m) <= 1e-4 * abs(m) + 1e-8 for m in function.minima),
        "f": result.fun,
        "gradient_norm": float(result.grad.norm()),
        "steps": result.nit,
        "evaluations": result.nfev,
        "products": result.nhev,
        "cost": round(sum(record.cost.gradient_equivalents for record in result.records), 2),
    }


def runs(numbers: Iterable[int]) -> dict[str, Callable[[], Row]]:
    """Every function from every start by every side."""
    smallest = {f.number: f for f in reversed(FUNCTIONS)}
    return {
        f"{number}; {factor}x; {side}": partial(run, smallest[number], factor, side)
        for number in sorted(numbers)
        for factor in FACTORS
        for side in SIDES
    }


def text_of(rows: Iterable[Row]) -> str:
    """The tables of the page: where each search arrives, and what it costs beside the default where both do."""
    rows = list(rows)
    of = {(r["function"], r["factor"], r["side"]): r for r in rows}
    body = []
    for side in SIDES:
        own = [r for r in rows if r["side"] == side]
        both = [(r, of[r["function"], r["factor"], DEFAULT]) for r in own]
        both = [(r, d) for r, d in both if r["success"] and d["success"] and d["cost"] > 0]
        logs = [math.log(max(r["cost"], 1) / max(d["cost"], 1)) for r, d in both]
        body.append(
            [
                side,
                *(_arrived([r for r in own if r["factor"] == factor]) for factor in FACTORS),
                f"{statistics.median(r['steps'] for r, _ in both):.0f}",
                f"{statistics.median(r['cost'] for r, _ in both):.0f}",
                f"{math.exp(statistics.fmean(logs)):.2f}",
                f"{sum(r['cost'] for r in own):,.0f}",
            ]
        )
    head = ["search", *(f"from {f} x0" for f in FACTORS), "steps", "cost", "cost beside the default's", "total cost"]
    return table(head, body)


def _arrived(rows: list[Row]) -> str:
    return f"{sum(r['success'] for r in rows)} ({sum(r['success'] and r['published'] for r in rows)}) of {len(rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="functions of the paper")
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only:
        print(text_of(made() for made in runs(arguments.only).values()))
        return
    every = runs({f.number for f in FUNCTIONS})
    about = {"steps": STEPS}
    record = load(NAME) if arguments.table else complete(NAME, about, every)
    show(NAME, "step-lengths", text_of(record["runs"].values()))


if __name__ == "__main__":
    main()
