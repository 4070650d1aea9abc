"""Combinations of the strategies of `NewtonKrylov` on three functions: does each arrive, and is what it claims true?

python -m benchmarks.combinations                    # so many that all triples of choices occur; minutes
python -m benchmarks.combinations --all              # every combination; two hours of one core
python -m benchmarks.combinations --all Rosenbrock   # every one on this function, triples on the others
python -m benchmarks.combinations --table            # the page again, from the record

Runs are kept in runs.jsonl, beside the record and not part of it, so that a run that was broken off goes on.

A run is at fault if it repeats a step that was rejected, raises the loss though its step search looks at it, claims a
minimum where there is none or none where there is one, or ends by an exception that is no refusal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import imstep
from benchmarks.combinations.covering import covering
from benchmarks.record_page import Row, load, now, path_of, show, table
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
from imstep.optim import (
    BestRateForcing,
    BlendedConjugateGradient,
    ConjugateGradient,
    Direct,
    ExactHessian,
    FixedProducts,
    GaussNewtonFirst,
    GeneralizedLanczos,
    Hutchinson,
    Kronecker,
    MinimalResidual,
    MinimizeResult,
    NoPreconditioning,
    Nystrom,
    Recycling,
    ResidualForcing,
    SquaredGradients,
    SteihaugToint,
    StepRecord,
    Termination,
)
from imstep.runs.environment import environment
from imstep.runs.files import write_json

NAME = "combinations"
RUNS = path_of(NAME).with_name("runs.jsonl")
BY = ("function", "step")
F64 = torch.float64
STEPS = 60
FACTORS: dict[str, dict[str, Any]] = {
    "curvature": {"Gauss-Newton first": GaussNewtonFirst(), "Hessian": ExactHessian()},
    "solver": {
        "conjugate gradients": ConjugateGradient(),
        "following negative curvature": ConjugateGradient(follow=True),
        "blended": BlendedConjugateGradient(),
        "minimal residual": MinimalResidual(),
        "Steihaug-Toint": SteihaugToint(),
        "Lanczos": GeneralizedLanczos(),
        "direct": Direct(),
    },
    "damping": {"Levenberg-Marquardt": LevenbergMarquardt(), "none": NoDamping()},
    "step": {
        "Armijo": Armijo(),
        "Armijo, forward": Armijo(forward=2.0),
        "strong Wolfe": StrongWolfe(),
        "Taylor monitor": TaylorMonitor(),
        "exact error": TaylorMonitor(error=ExactEstimate()),
        "trust region": TrustRegion(),
        "fixed": FixedStep(),
    },
    "forcing": {"best rate": BestRateForcing(), "two products": FixedProducts(2), "residual": ResidualForcing()},
    "preconditioning": {
        "none": NoPreconditioning(),
        "recycling": Recycling(),
        "Hutchinson": Hutchinson(),
        "squared gradients": SquaredGradients(),
        "Nyström": Nystrom(rank=2),
        "Kronecker": Kronecker(),
    },
    "momentum": {"without": False, "with": True},
}


def rosenbrock(x: Tensor) -> Tensor:
    """Least at (1, 1), along a curved valley."""
    a, b = x.unbind()
    return 100 * (b - a * a) ** 2 + (1 - a) ** 2


def saddle(x: Tensor) -> Tensor:
    """Least on xy = 1, at x = y; a saddle at 0."""
    a, b = x.unbind()
    return (a * b - 1) ** 2 + (a - b) ** 2 / 10


def freudenstein(x: Tensor) -> Tensor:
    """By Freudenstein and Roth: least, 0, at (5, 4); a local minimum, 48.98, at (11.41, -0.8968)."""
    a, b = x.unbind()
    return (-13 + a + ((5 - b) * b - 2) * b) ** 2 + (-29 + a + ((b + 1) * b - 14) * b) ** 2


PROBLEMS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "Rosenbrock": (rosenbrock, torch.tensor([-0.796381, 0.639213], dtype=F64)),
    "saddle": (saddle, torch.zeros(2, dtype=F64)),
    "Freudenstein": (freudenstein, torch.tensor([0.5, -2.0], dtype=F64)),
}
MINIMA = (0.0, 48.984253679)  # of all three


CHOICES = [list(PROBLEMS), *(list(choices) for choices in FACTORS.values())]
Combination = tuple[str, ...]  # a function and a choice of each factor


def selection(strength: int) -> list[Combination]:
    """Combinations with all pairs (2) or triples (3) of choices, of which the function is one."""
    rows = covering([len(choices) for choices in CHOICES], strength)
    return [tuple(choices[i] for choices, i in zip(CHOICES, row, strict=True)) for row in rows]


def outcome(combination: Combination) -> Row:
    """How a run ends, with the fault that it has, if any."""
    problem, *chosen = combination
    function, start = PROBLEMS[problem]
    options = {name: FACTORS[name][choice] for name, choice in zip(FACTORS, chosen, strict=True)}
    row: Row = {"function": problem, **dict(zip(FACTORS, chosen, strict=True))}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Kronecker factors have no layers here, and say so
            result = imstep.minimize(function, start, maxiter=STEPS, max_trials=12, **options)
    except (ValueError, TypeError) as error:
        return {**row, "end": "refused", "fault": "", "message": str(error)}
    except Exception as error:
        return {**row, "end": "exception", "fault": f"{type(error).__name__}: {error}"}
    at_minimum = is_minimum(function, result.x)
    return {
        **row,
        "end": "minimum" if at_minimum else result.termination.name.lower(),
        "fault": fault(result, at_minimum, monitored=not isinstance(options["step"], FixedStep)),
        "steps": result.nit,
        "f": result.fun,
    }


def fault(result: MinimizeResult, at_minimum: bool, monitored: bool) -> str:
    """What is wrong with a run; empty if nothing is."""
    records = result.records
    if any(not a.accepted and _same(a, b) for a, b in pairwise(records)):
        return "repeats a rejected step"
    if monitored and any(r.accepted and r.new_loss > r.loss + 1e-13 * abs(r.loss) for r in records):
        return "raises the loss"
    if result.success and not at_minimum:
        return "claims a minimum"
    ended = result.termination is not Termination.MAX_ITERATIONS
    return "does not claim its minimum" if at_minimum and ended and not result.success else ""


def _same(a: StepRecord, b: StepRecord) -> bool:
    of = lambda r: (r.accepted, r.direction_norm, r.step_length, r.damping, r.radius)
    return repr(of(a)) == repr(of(b))  # nan is not equal to itself


def is_minimum(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether f is that of a minimum, Newton's step short and no curvature negative, by PyTorch's derivatives."""
    if all(abs(float(function(x)) - f) > 1e-6 for f in MINIMA):
        return False  # far away a Hessian is singular in float64
    at = x.clone().requires_grad_()
    gradient = torch.autograd.grad(function(at), at)[0]
    hessian = torch.autograd.functional.hessian(function, x)
    if not bool(gradient.isfinite().all() and hessian.isfinite().all()):
        return False
    values = torch.linalg.eigvalsh(hessian)
    step = torch.linalg.pinv(hessian, rtol=1e-10, hermitian=True) @ gradient
    return bool(values[0] >= -1e-7 * values[-1] and step.norm() <= 1e-5 * (1 + x.norm()))


def complete(combinations: Sequence[Combination], processes: int) -> None:
    """Run those that runs.jsonl lacks, and write the record: how many runs end how, and each that is at fault."""
    made = {_of(row): row for row in map(json.loads, RUNS.read_text().splitlines())} if RUNS.exists() else {}
    lacking = [combination for combination in combinations if combination not in made]
    with RUNS.open("a") as file, multiprocessing.Pool(processes, torch.set_num_threads, (1,)) as pool:
        for row in track(pool.imap_unordered(outcome, lacking, 10), "Combinations", len(lacking)):
            made[_of(row)] = row
            file.write(f"{json.dumps(row)}\n")
            file.flush()
    rows = [made[combination] for combination in combinations]
    ends = [
        {**dict(zip(BY, key, strict=True)), "ends": dict(Counter(r["end"] for r in rows if _by(r) == key))}
        for key in dict.fromkeys(map(_by, rows))
    ]
    about = {"date": now(), "environment": environment(), "steps": STEPS, "runs": len(rows)}
    write_json(path_of(NAME), {**about, "ends": ends, "faults": [r for r in rows if r["fault"]]})


def _of(row: Row) -> Combination:
    return tuple(row[key] for key in ("function", *FACTORS))


def _by(row: Row) -> Combination:
    return tuple(row[key] for key in BY)


# --- the page -----------------------------------------------------------------------------------------------------


def text_of(record: Row) -> str:
    """How many runs end how, by function and step search, and those at fault."""
    ends = list(dict.fromkeys(["minimum", *sorted({end for group in record["ends"] for end in group["ends"]})]))
    body = [
        [*(group[key] for key in BY), *(f"{group['ends'].get(end, 0):,}" for end in ends), str(at_fault(record, group))]
        for group in record["ends"]
    ]
    faults = [f"- {'; '.join(_of(r))}: {r['fault']}" for r in record["faults"]]
    return "\n\n".join(
        [
            f"{record['runs']:,} of {math.prod(map(len, CHOICES)):,} combinations of a function and strategies:",
            table(["function", "step search", *(end.replace("_", " ") for end in ends), "at fault"], body),
            "\n".join(["At fault:", "", *faults]) if faults else "None is at fault.",
        ]
    )


def at_fault(record: Row, group: Row) -> int:
    """The number of runs at fault among those of a function and step search."""
    return sum(_by(row) == _by(group) for row in record["faults"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", nargs="*", choices=list(PROBLEMS), help="every combination on all or these functions")
    parser.add_argument("--processes", type=int, default=1, help="side by side")
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    arguments = parser.parse_args()
    if not arguments.table:
        whole = PROBLEMS if arguments.all == [] else arguments.all or ()
        every = itertools.product(whole, *CHOICES[1:])
        complete(list(dict.fromkeys([*every, *selection(3)])), arguments.processes)
    show(NAME, "step-lengths", text_of(load(NAME)))


if __name__ == "__main__":
    main()
