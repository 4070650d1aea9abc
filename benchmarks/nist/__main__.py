"""NIST's nonlinear regressions by imstep and by SciPy, each from its two starts.

python -m benchmarks.nist           # what the record lacks; writes record.json and docs/fitting.md
python -m benchmarks.nist --table   # the tables again, from the record

All defaults, but for SciPy's tolerances, as small as it takes, and its `x_scale="jac"`. Derivatives are exact.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.optimize
import torch

import imstep
from benchmarks.nist.problems import REGRESSIONS, Regression
from benchmarks.record_page import Row, complete, load, show, table

NAME = "nist"
ENOUGH = 6
"""Digits of all parameters that count as right."""


def by_imstep(regression: Regression, start: int) -> Row:
    """With the defaults of ``minimize``."""
    result = imstep.minimize(regression, regression.starts[start], method="least-squares")
    return {
        "digits": regression.digits(result.x),
        "success": result.success,
        "message": result.termination.name.lower(),
        "jacobians": result.nit,
        "evaluations": result.nfev,
    }


def by_scipy(regression: Regression, start: int, method: str) -> Row:
    """With exact Jacobians by PyTorch."""
    found = scipy.optimize.least_squares(
        lambda b: regression.residuals(torch.from_numpy(b)).numpy(),
        regression.starts[start].numpy(),
        jac=lambda b: torch.func.jacfwd(regression.residuals)(torch.from_numpy(b.copy())).numpy(),
        method=method,
        x_scale="jac",
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
        max_nfev=2000,
    )
    return {
        "digits": regression.digits(torch.from_numpy(np.asarray(found.x))),
        "success": bool(found.success),
        "message": str(found.message)[:60],
        "jacobians": int(found.njev or 0),
        "evaluations": int(found.nfev),
    }


SIDES: dict[str, Callable[[Regression, int], Row]] = {
    "imstep": by_imstep,
    "SciPy lm": partial(by_scipy, method="lm"),
    "SciPy trf": partial(by_scipy, method="trf"),
}


def timed(side: str, regression: Regression, start: int) -> Row:
    """A run, and the processor's seconds that it took."""
    began = time.process_time()
    row = SIDES[side](regression, start)
    return {**row, "seconds": time.process_time() - began}


def text_of(record: dict[str, Any]) -> str:
    """The tables of the page."""
    made = record["runs"]
    of = lambda side, name, start: made[f"{name}; {start + 1}; {side}"]
    body = []
    for side in SIDES:
        rows = [of(side, r.name, start) for r in REGRESSIONS for start in (0, 1)]
        right = [row["digits"] >= ENOUGH for row in rows]
        claimed = sum(row["success"] and not ok for row, ok in zip(rows, right, strict=True))
        body.append(
            [
                side,
                f"{sum(right)} of {len(rows)}",
                str(claimed),
                f"{min(row['digits'] for row, ok in zip(rows, right, strict=True) if ok):.1f}",
                f"{statistics.median(row['digits'] for row in rows):.1f}",
                f"{statistics.median(row['jacobians'] for row in rows):.0f}",
                f"{statistics.median(row['evaluations'] for row in rows):.0f}",
                f"{sum(row['seconds'] for row in rows):.0f}",
            ]
        )
    head = ["side", f"{ENOUGH} digits or more", "success claimed wrongly", "least digits of those", "median digits",
            "median Jacobians", "median evaluations", "seconds in all"]  # fmt: skip
    cell = lambda side, name, start: (
        f"{of(side, name, start)['digits']:.1f} / {of(side, name, start)['jacobians']}"
        f" / {of(side, name, start)['evaluations']}"
    )
    details = [[r.name, *(cell(side, r.name, start) for side in SIDES for start in (0, 1))] for r in REGRESSIONS]
    columns = ["set", *(f"{side}, start {start}" for side in SIDES for start in (1, 2))]
    return "\n\n".join([table(head, body), "Digits / Jacobians / evaluations:", table(columns, details)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the tables from the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = {
        f"{r.name}; {start + 1}; {side}": partial(timed, side, r, start)
        for r in REGRESSIONS
        for start in (0, 1)
        for side in SIDES
    }
    show(NAME, "fitting", text_of(load(NAME) if arguments.table else complete(NAME, {}, runs)))


if __name__ == "__main__":
    main()
