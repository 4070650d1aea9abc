"""Step searches of `minimize` on the functions of Moré, Garbow and Hillstrom: steps and evaluations to a minimum.

python -m benchmarks.step_searches           # prints a table; some minutes
python -m benchmarks.step_searches --only 1  # functions by number

The smallest size of each function with up to 12 variables, from the standard start and ten times that, with the tests
that minimize has by default and 150 steps at most. Counts do not depend on the machine; nothing is written.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import imstep
from benchmarks.more_garbow_hillstrom.problems import FUNCTIONS
from benchmarks.record_page import table
from imstep.globalization import Armijo, StrongWolfe, TaylorMonitor

STEPS = 150
LARGEST = 12
SIDES: dict[str, dict[str, Any]] = {
    "forward Armijo, the default": {},
    "Armijo": {"step": Armijo(), "max_trials": 12},
    "strong Wolfe": {"step": StrongWolfe(), "max_trials": 12},
    "Taylor monitor": {"step": TaylorMonitor(), "max_trials": 12},
    "Taylor monitor, theta 0.9": {"step": TaylorMonitor(theta=0.9), "max_trials": 12},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="functions of the paper")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    smallest = {f.number: f for f in reversed(FUNCTIONS) if f.size <= LARGEST and f.number in (only or [f.number])}
    body = []
    for side, options in SIDES.items():
        runs = [
            imstep.minimize(f, f.start_at(factor), maxiter=STEPS, **options)
            for f in smallest.values()
            for factor in (1.0, 10.0)
        ]
        counts = [sum(getattr(r, name) for r in runs) for name in ("success", "nit", "nfev", "nhev")]
        body.append([side, f"{counts[0]} of {len(runs)}", *(f"{count:,}" for count in counts[1:])])
        print("|", *body[-1], "|", flush=True)
    print(table(["search", "minima", "steps", "evaluations", "products"], body))


if __name__ == "__main__":
    main()
