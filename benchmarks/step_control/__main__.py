"""Step lengths and other settings compared: the cost at which the optimizer reaches a loss.

python -m benchmarks.step_control           # what the record lacks; writes record.json and the tables
python -m benchmarks.step_control --table   # the tables again, from the record

Counts are gradient-equivalents, which do not depend on the machine; seconds are not recorded.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.record_page import Row, complete, load, show, table
from benchmarks.step_control.problems import PROBLEMS
from imstep.globalization import (
    Armijo,
    ExactEstimate,
    FixedStep,
    LevenbergMarquardt,
    NoDamping,
    StrongWolfe,
    TaylorMonitor,
    TrustRegion,
)
from imstep.linalg import BestRate, StoppingRule
from imstep.optim import (
    BestRateForcing,
    ConjugateGradient,
    GaussNewtonFirst,
    Kronecker,
    NewtonKrylov,
    NonFiniteLossError,
    Recycling,
    SteihaugToint,
    StepOutcome,
)
from imstep.optim.attempt import CONFIDENCE, CONTRACTION
from imstep.optim.forcing import Situation

NAME = "step-control"
SEEDS = range(5)
VARIANT_SEEDS = range(3)


@dataclass(frozen=True)
class Reshaped(BestRateForcing):
    """The default with another window, or another response to full steps that the model foresaw.

    Attributes:
        contractions: whether a gradient norm that fell below half counts.
        confidence: what stands for CONFIDENCE; 1 for none.
        exponent: of the contraction in the fraction of the rate that still pays.
    """

    window: int = 3
    contractions: bool = True
    confidence: float = CONFIDENCE
    exponent: float = 3.0

    def rules(self, situation: Situation) -> tuple[StoppingRule, ...]:
        seen = situation.contraction
        if seen > CONTRACTION:  # confidence only
            seen = seen ** (math.log(self.confidence) / math.log(CONFIDENCE))
        elif not self.contractions:
            seen = 1.0
        rules = super().rules(replace(situation, contraction=seen ** (self.exponent / 3)))
        return tuple(replace(r, window=self.window) if isinstance(r, BestRate) else r for r in rules)


def recycled(pairs: int = 10, every: int = 2, decay: float = 0.8) -> dict[str, Any]:
    return {"preconditioning": Recycling(Kronecker(every=every, decay=decay), pairs=pairs)}


SIDES: dict[str, dict[str, Any]] = {
    "Taylor monitor": {},
    "Taylor monitor, exact error": {"step": TaylorMonitor(error=ExactEstimate())},
    "Armijo": {"step": Armijo()},
    "strong Wolfe": {"step": StrongWolfe()},
    "full step or none": {"step": Armijo(), "max_trials": 1},
    "fixed step 1": {"step": FixedStep()},
    "Taylor monitor, no damping": {"damping": NoDamping()},
    "Armijo, no damping": {"step": Armijo(), "damping": NoDamping()},
    "trust region, no damping": {"step": TrustRegion(), "solver": SteihaugToint(), "damping": NoDamping()},
    "fixed step 1, no damping": {"step": FixedStep(), "damping": NoDamping()},
}
MONITOR: dict[str, dict[str, Any]] = {
    **{
        f"theta {theta:g}, forward {forward:g}": {"step": TaylorMonitor(theta, forward)}
        for theta in (0.1, 0.25, 0.5)
        for forward in (1.0, 2.0, 3.0)
        if (theta, forward) != (0.25, 2.0)
    },
    **{f"acceptance {a:g}": {"step": TaylorMonitor(acceptance=a)} for a in (0.0, 0.1)},
    **{f"radius from {r:g}": {"step": TaylorMonitor(radius=r)} for r in (1e-3, 1e3)},
    "4 trials": {"max_trials": 4},
}
OTHERS: dict[str, dict[str, Any]] = {
    **{f"damping from {x:g}": {"damping": LevenbergMarquardt(initial=x)} for x in (1e-4, 1e-2)},
    **{f"damping factor {x:g}": {"damping": LevenbergMarquardt(factor=x)} for x in (1.5, 3.0)},
    "damping thresholds 0.1, 0.9": {"damping": LevenbergMarquardt(lower=0.1, upper=0.9)},
    "damping thresholds 0.5, 0.9": {"damping": LevenbergMarquardt(lower=0.5, upper=0.9)},
    **{f"forcing window {w}": {"forcing": Reshaped(window=w)} for w in (1, 5, 10)},
    "contractions not seen": {"forcing": Reshaped(contractions=False)},
    **{f"confidence {x:g}": {"forcing": Reshaped(confidence=x)} for x in (0.8, 1.0)},
    "contraction squared": {"forcing": Reshaped(exponent=2.0)},
    "eta 0.1": {"forcing": BestRateForcing(eta=0.1)},
    "warm start 0.5": {"solver": ConjugateGradient(warm_start=0.5)},
    "momentum": {"momentum": True},
    **{f"close {x:g}": {"curvature": GaussNewtonFirst(close=x)} for x in (0.0, 1e-2)},
    **{f"factors every {n} steps": recycled(every=n) for n in (1, 5, 10)},
    **{f"factors, decay {x:g}": recycled(decay=x) for x in (0.5, 0.95)},
    "no recycling": {"preconditioning": Kronecker()},
    **{f"{n} pairs": recycled(pairs=n) for n in (5, 30)},
}
NETWORKS = [name for name in PROBLEMS if name != "rosenbrock"]  # which has nothing to factor


def run(name: str, side: str, options: dict[str, Any], seed: int) -> Row:
    """One run until the target is reached, the budget is spent or nothing more happens."""
    problem = PROBLEMS[name]
    parameters, closure = problem.make(seed)
    optimizer = NewtonKrylov(parameters, **{**options, **problem.options})
    loss, steps, reason = math.inf, 0, "budget"
    while optimizer.cost.gradient_equivalents < problem.budget:
        try:
            optimizer.step(closure)
        except NonFiniteLossError:
            reason = "not finite"
            break
        loss, steps = optimizer.last_step.new_loss, steps + 1
        if loss <= problem.target or optimizer.last_step.outcome is StepOutcome.CONVERGED:
            reason = "target" if loss <= problem.target else "stationary"
            break
    cost = optimizer.cost
    return {
        "problem": name,
        "side": side,
        "seed": seed,
        "reason": reason,
        "loss": loss,
        "gradient_equivalents": round(cost.gradient_equivalents, 2),
        "steps": steps,
        "products": cost.products,
        "losses": cost.losses,
        "gradients": cost.gradients,
    }


def runs() -> dict[str, Callable[[], Row]]:
    """All runs, by name."""
    return {
        f"{name}; {side}; {seed}": partial(run, name, side, options, seed)
        for sides, names, seeds in (
            (SIDES, PROBLEMS, SEEDS),
            (MONITOR, PROBLEMS, VARIANT_SEEDS),
            (OTHERS, NETWORKS, VARIANT_SEEDS),
        )
        for side, options in sides.items()
        for name in names
        for seed in seeds
    }


# --- tables -------------------------------------------------------------------------------------------------------


def cell(rows: list[Row]) -> str:
    """The median cost to the target, failures counted as infinite, and how many failed."""
    costs = [r["gradient_equivalents"] if r["reason"] == "target" else math.inf for r in rows]
    failed = sum(map(math.isinf, costs))
    middle = f"{median(costs):.0f}" if math.isfinite(median(costs)) else "-"
    return f"{middle} ({failed} failed)" if failed else middle


def costs(rows: Iterable[Row], sides: Iterable[str], names: Iterable[str], seeds: Iterable[int]) -> str:
    """A line a side, a column a problem."""
    some = [r for r in rows if r["seed"] in seeds]
    of = lambda side, name: [r for r in some if (r["side"], r["problem"]) == (side, name)]
    return table(["", *names], [[side, *(cell(of(side, name)) for name in names)] for side in sides])


def text_of(record: dict[str, Any]) -> str:
    """The tables of the page."""
    rows = record["runs"].values()
    problems = [f"- {name}: {p.description}; to {p.target:g} within {p.budget:g}" for name, p in PROBLEMS.items()]
    return "\n\n".join(
        [
            "\n".join(problems),
            costs(rows, SIDES, PROBLEMS, SEEDS),
            "Settings of the monitor, three starts; the default is theta 0.25, forward 2, acceptance 1e-4, 12 trials:",
            costs(rows, ["Taylor monitor", *MONITOR], PROBLEMS, VARIANT_SEEDS),
            "Other settings, likewise; the first line is the default:",
            costs(rows, ["Taylor monitor", *OTHERS], NETWORKS, VARIANT_SEEDS),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the tables from the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    show(NAME, "step-lengths", text_of(load(NAME) if arguments.table else complete(NAME, {}, runs())))


if __name__ == "__main__":
    main()
