"""The functions of Moré, Garbow and Hillstrom, Rosenbrock's and small networks from several starts, beside SciPy.

python -m benchmarks.more_garbow_hillstrom              # what the record lacks; writes it and docs/proofs.md
python -m benchmarks.more_garbow_hillstrom --only 3 10  # functions by number; prints, writes nothing
python -m benchmarks.more_garbow_hillstrom --table      # the page again, from the record
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

import imstep
from benchmarks.more_garbow_hillstrom.problems import FUNCTIONS
from benchmarks.record_page import Row, complete, load, show, table
from imstep.globalization import TaylorMonitor
from imstep.optim import ExactHessian, MinimizeResult

NAME = "more-garbow-hillstrom"
F64 = torch.float64
TOLERANCE = 1e-8
STEPS = 1000
SEARCH = {"step": TaylorMonitor(), "max_trials": 12}  # of NewtonKrylov; minimize's own is in step_searches.py
Function = Callable[[Tensor], Tensor]


# --- what is minimised ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A function and a start.

    Attributes:
        group: of cases that are summed up together.
        minima: known values of f at local minima; empty where none is known.
    """

    group: str
    name: str
    function: Function
    start: Tensor
    minima: tuple[float, ...] = ()


def rosenbrock(x: Tensor) -> Tensor:
    """The chained form: each variable but the ends is in two terms."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def rosenbrock_cases() -> list[Case]:
    """From the standard start, ten times that, and three random ones."""
    cases = []
    for n in (2, 3, 5, 10, 20, 50, 100):
        standard = torch.tensor([-1.2, 1.0], dtype=F64).repeat(n // 2 + 1)[:n]
        normal = [2 * torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        starts = {"standard": standard, "10x": 10 * standard, **{f"random {i}": x for i, x in enumerate(normal)}}
        cases += [Case("Rosenbrock", f"Rosenbrock, n = {n}, {at}", rosenbrock, x) for at, x in starts.items()]
    return cases


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": lambda z, y: (z - y).square().mean(),
    "cross entropy": lambda z, y: nn.functional.cross_entropy(z, y.argmax(1)),
    "Huber": lambda z, y: nn.functional.huber_loss(z, y, delta=0.5),
}


def network_case(seed: int) -> Case:
    """A network of random widths, activation and loss on random data, with a penalty that makes minima isolated."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    widths = [draw(2, 5), *(draw(2, 9) for _ in range(draw(1, 4))), draw(2, 4)]
    activation = (nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU)[draw(0, 4)]
    loss_name = list(LOSSES)[draw(0, 3)]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    model = nn.Sequential(*layers[:-1]).to(F64)
    x = torch.randn(40, widths[0], dtype=F64, generator=generator)
    y = torch.randn(40, widths[-1], dtype=F64, generator=generator)
    shapes = [p.shape for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def function(w: Tensor) -> Tensor:
        parts = w.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return LOSSES[loss_name](torch.func.functional_call(model, weights, (x,)), y) + 1e-3 * w.square().sum()

    size = sum(shape.numel() for shape in shapes)
    label = f"{'-'.join(map(str, widths))}, {activation.__name__}, {loss_name}, seed {seed}"
    return Case("networks", label, function, torch.randn(size, dtype=F64, generator=generator))


def function_cases() -> list[Case]:
    """Every function from its standard start and from ten times that."""
    return [
        Case(f"{factor:g}x", f"{f.number} {f.name}, n = {f.size}, {factor:g}x", f, f.start_at(factor), f.minima)
        for f in FUNCTIONS
        for factor in (1.0, 10.0)
    ]


# --- by what --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a method found, and what it cost.

    Attributes:
        steps: taken.
        cost: in gradients; a loss 1/3, a Hessian product 2, the Hessian of n variables 2 n.
        highest_rise: the largest relative increase of f over a step, at least 0; None where steps are not seen.
    """

    x: Tensor
    steps: int
    cost: float
    message: str
    highest_rise: float | None = None


def highest_rise(result: MinimizeResult) -> float:
    """Above 0 by rounding at most, if every step was a descent."""
    accepted = [r for r in result.records if r.accepted]
    return max((max(r.new_loss - r.loss, 0.0) / max(abs(r.loss), 1e-300) for r in accepted), default=0.0)


def by_imstep(scaled: bool = False, **options: Any) -> Callable[[Function, Tensor], Outcome]:
    """`scaled` measures each variable in units of its start, or of 1 where that is 0."""

    def run(function: Function, start: Tensor) -> Outcome:
        scale = torch.where(start == 0, 1.0, start.abs()) if scaled else None
        tolerance = TOLERANCE if scale is None else TOLERANCE * min(1.0, float(scale.min()))  # it is on ‖scale g‖
        units = 1.0 if scale is None else scale
        result = imstep.minimize(function, start, tol=tolerance, maxiter=STEPS, scale=units, **{**SEARCH, **options})
        cost = sum(r.cost.gradient_equivalents for r in result.records)
        return Outcome(result.x, result.nit, cost, result.termination.name.lower(), highest_rise(result))

    return run


class Counted:
    """A function as SciPy wants it, with its derivatives by PyTorch and a count of the cost."""

    def __init__(self, function: Function) -> None:
        self.function, self.cost = function, 0.0

    def loss(self, x: np.ndarray) -> float:
        self.cost += 1 / 3
        return float(self.function(torch.from_numpy(x)))

    def gradient(self, x: np.ndarray) -> np.ndarray:
        self.cost += 1
        w = torch.from_numpy(x.copy()).requires_grad_()
        return torch.autograd.grad(self.function(w), w)[0].numpy()

    def loss_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        self.cost += 1
        w = torch.from_numpy(x.copy()).requires_grad_()
        loss = self.function(w)
        return float(loss.detach()), torch.autograd.grad(loss, w)[0].numpy()

    def product(self, x: np.ndarray, p: np.ndarray) -> np.ndarray:
        self.cost += 2
        return torch.autograd.functional.vhp(self.function, torch.from_numpy(x), torch.from_numpy(p))[1].numpy()

    def hessian(self, x: np.ndarray) -> np.ndarray:
        self.cost += 2 * len(x)
        return torch.autograd.functional.hessian(self.function, torch.from_numpy(x), vectorize=True).numpy()


def by_scipy(method: str, order: str, **options: float) -> Callable[[Function, Tensor], Outcome]:
    """A method of `scipy.optimize.minimize`; `order` says what it is given: gradient, product or hessian."""

    def run(function: Function, start: Tensor) -> Outcome:
        counted = Counted(function)
        derivatives: dict[str, Any] = {
            "gradient": {"fun": counted.loss_and_gradient, "jac": True},
            "product": {"fun": counted.loss, "jac": counted.gradient, "hessp": counted.product},
            "hessian": {"fun": counted.loss, "jac": counted.gradient, "hess": counted.hessian},
        }[order]
        x0 = start.numpy().copy()
        try:
            with np.errstate(all="ignore"):
                found = scipy.optimize.minimize(x0=x0, method=method, options=options, **derivatives)
        except (ValueError, np.linalg.LinAlgError) as error:  # it met numbers that are not finite
            return Outcome(start, 0, counted.cost, f"{type(error).__name__}: {error}"[:80])
        return Outcome(torch.from_numpy(np.array(found.x)), int(found.nit), counted.cost, str(found.message)[:80])

    return run


SIDES: dict[str, Callable[[Function, Tensor], Outcome]] = {
    "imstep": by_imstep(),
    "imstep, scale = abs(x0)": by_imstep(scaled=True),
    "imstep, Hessian only": by_imstep(curvature=ExactHessian()),
    "SciPy trust-exact": by_scipy("trust-exact", "hessian", gtol=TOLERANCE, maxiter=STEPS),
    "SciPy Newton-CG": by_scipy("Newton-CG", "product", xtol=1e-12, maxiter=STEPS),
    "SciPy L-BFGS-B": by_scipy("L-BFGS-B", "gradient", gtol=TOLERANCE, ftol=0.0, maxiter=10 * STEPS, maxfun=10 * STEPS),
}


# --- how well -------------------------------------------------------------------------------------------------------


def judged(case: Case, side: str, outcome: Outcome) -> Row:
    """A row of the record: whether the point is a minimum to second order, by PyTorch's own derivatives."""
    x = outcome.x.detach().clone().requires_grad_()
    loss = case.function(x)
    gradient = torch.autograd.grad(loss, x)[0]
    hessian = torch.autograd.functional.hessian(case.function, outcome.x.detach())
    finite = bool(loss.isfinite() and gradient.isfinite().all() and hessian.isfinite().all())
    values = torch.linalg.eigvalsh((hessian + hessian.mT) / 2) if finite else torch.full((1,), torch.nan)
    lowest, highest = float(values[0]), float(values.abs().max())
    norm, f = float(gradient.norm()), float(loss.detach())
    # Rounding x alone changes g by this much; where curvatures are huge that is more than the tolerance.
    rounding = 10 * torch.finfo(F64).eps * (hessian.abs() @ outcome.x.abs())
    stationary = norm <= 1.01 * TOLERANCE or bool((gradient.abs() <= rounding).all())
    return {
        "case": case.name,
        "group": case.group,
        "side": side,
        "size": len(x),
        "reached": finite and stationary and lowest >= -1e-8 * max(highest, 1.0),
        "f": f,
        "gradient_norm": norm,
        "lowest_eigenvalue": lowest,
        "highest_eigenvalue": highest,
        "published": next((m for m in case.minima if abs(f - m) <= 1e-4 * abs(m) + 1e-8), None),
        **{key: value for key, value in asdict(outcome).items() if key != "x"},
    }


def runs(cases: list[Case]) -> dict[str, Callable[[], Row]]:
    """Every case by every side."""
    return {
        f"{case.name}; {side}": lambda case=case, side=side: judged(case, side, SIDES[side](case.function, case.start))
        for case in cases
        for side in SIDES
    }


def near(row: Row) -> bool:
    """Whether the point is one with ‖g‖ <= 1e-5, without negative curvature."""
    curvatures = float(row["lowest_eigenvalue"]), max(float(row["highest_eigenvalue"]), 1.0)
    return row["reached"] or (float(row["gradient_norm"]) <= 1e-5 and curvatures[0] >= -1e-8 * curvatures[1])


def text_of(record: dict[str, Any]) -> str:
    """The tables of the page."""
    rows = list(record["runs"].values())
    missed = [
        f"- {r['case']}: f = {r['f']:.6g}, ‖g‖ = {r['gradient_norm']:.0e}, curvatures up to "
        f"{r['highest_eigenvalue']:.0e}; {r['message'].replace('_', ' ')} after {r['steps']} steps"
        for r in rows
        if r["side"] == "imstep" and not r["reached"]
    ]
    steps = sum(r["steps"] for r in rows if r["highest_rise"] is not None)
    rise = max(r["highest_rise"] for r in rows if r["highest_rise"] is not None)
    return "\n\n".join(
        [
            _summary(rows),
            f"The largest relative increase of f over any of imstep's {steps:,} steps: {rise:.0e}.",
            "\n".join(["Not reached by imstep with its defaults:", "", *missed]),
            "f, where imstep arrives, steps and cost; the cheapest side of SciPy that gets there, with its cost.",
            _details([r for r in rows if r["group"] in ("1x", "10x")]),
        ]
    )


def _summary(rows: list[Row]) -> str:
    groups = list(dict.fromkeys(row["group"] for row in rows))
    everywhere = {r["case"] for r in rows} - {r["case"] for r in rows if not r["reached"]}
    body = []
    for side in SIDES:
        own = [r for r in rows if r["side"] == side]
        some = [[r for r in own if r["group"] == group] for group in groups]
        cells = [f"{sum(r['reached'] for r in g)} ({sum(map(near, g))}) of {len(g)}" for g in some]
        cost = statistics.median(r["cost"] for r in own if r["case"] in everywhere)
        body.append([side, *cells, f"{cost:.0f}", f"{sum(r['cost'] for r in own):,.0f}"])
    return table(["side", *groups, f"median cost of the {len(everywhere)} that all reach", "total cost"], body)


def _details(rows: list[Row]) -> str:
    body: dict[str, list[str]] = {}
    for row in rows:
        if row["side"] == "imstep":
            rivals = [r for r in rows if r["case"] == row["case"] and "SciPy" in r["side"] and r["reached"]]
            best = min(rivals, key=lambda r: r["cost"], default=None)
            body.setdefault(row["case"].removesuffix(f", {row['group']}"), []).extend(
                [
                    f"{row['f']:.5g}{'' if row['published'] is not None or not row['reached'] else ' (another)'}",
                    f"{row['steps']} / {row['cost']:.0f}" if row["reached"] else "-",
                    "-" if best is None else f"{best['side'].removeprefix('SciPy ')} {best['cost']:.0f}",
                ]
            )
    head = ["function", *(f"{at}: {what}" for at in ("1x", "10x") for what in ("f", "steps / cost", "SciPy"))]
    return table(head, [[name, *cells] for name, cells in body.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="functions of the paper; writes nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only:
        for key, run in runs([c for c in function_cases() if int(c.name.split()[0]) in arguments.only]).items():
            print(key, run())
        return
    cases = [*function_cases(), *rosenbrock_cases(), *map(network_case, range(20))]
    about = {"tolerance": TOLERANCE, "most_steps": STEPS}
    show(NAME, "proofs", text_of(load(NAME) if arguments.table else complete(NAME, about, runs(cases))))


if __name__ == "__main__":
    main()
