"""Losses that DeepXDE's own optimizers and imstep reach in equal time, on two of DeepXDE's demonstrations.

    python -m benchmarks.deepxde          # measures what record.json lacks, and writes the table of docs/frameworks.md
    python -m benchmarks.deepxde --short  # a fraction of a second each; writes nothing

Time is the process's CPU time with one thread, so that other work on the machine changes little. The evaluation of the
loss that is recorded does not count. Adam has DeepXDE's usual rate and is not tuned; L-BFGS has DeepXDE's settings;
NNCG is meant for the end of a training and begins after a quarter of the time with Adam.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

os.environ["DDE_BACKEND"] = "pytorch"

import deepxde as dde
import torch

import imstep
from benchmarks.record_page import complete, show, table

SEED = 0
SECONDS = (2.0, 4.0, 8.0)


def poisson() -> tuple[Any, Any]:
    """u'' = -π² sin πx on [-1, 1], u = 0 at both ends; 64 + 2 points, 1-50-50-50-1."""
    geometry = dde.geometry.Interval(-1, 1)
    ends = dde.icbc.DirichletBC(geometry, lambda x: 0, lambda x, on_boundary: on_boundary)
    equation = lambda x, u: dde.grad.hessian(u, x) + math.pi**2 * torch.sin(math.pi * x)
    solution = lambda x: torch.sin(math.pi * torch.as_tensor(x)).numpy()
    data = dde.data.PDE(geometry, equation, ends, num_domain=64, num_boundary=2, solution=solution, num_test=100)
    return data, dde.nn.FNN([1, 50, 50, 50, 1], "tanh", "Glorot uniform")


def heat() -> tuple[Any, Any]:
    """u_t = 0.4 u_xx, u(x, 0) = sin πx, u = 0 at both ends, on [0, 1]²; 500 + 80 + 160 points, 2-20-20-20-1."""
    space = dde.geometry.Interval(0, 1)
    geometry = dde.geometry.GeometryXTime(space, dde.geometry.TimeDomain(0, 1))
    start = dde.icbc.IC(geometry, lambda x: torch.sin(math.pi * torch.as_tensor(x[:, :1])).numpy(), lambda _, on: on)
    ends = dde.icbc.DirichletBC(geometry, lambda x: 0, lambda _, on_boundary: on_boundary)

    def equation(x: Any, u: Any) -> Any:
        return dde.grad.jacobian(u, x, i=0, j=1) - 0.4 * dde.grad.hessian(u, x, i=0, j=0)

    def solution(x: Any) -> Any:
        x = torch.as_tensor(x)
        return (torch.exp(-0.4 * math.pi**2 * x[:, 1:]) * torch.sin(math.pi * x[:, :1])).numpy()

    points = {"num_domain": 500, "num_boundary": 80, "num_initial": 160, "num_test": 500}
    data = dde.data.TimePDE(geometry, equation, [ends, start], solution=solution, **points)
    return data, dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal")


PROBLEMS: dict[str, Callable[[], tuple[Any, Any]]] = {"Poisson": poisson, "heat": heat}


class Clock(dde.callbacks.Callback):
    """Notes the loss at given CPU times, and ends the training at the last of them."""

    def __init__(self, until: list[float], spent: float = 0.0) -> None:
        super().__init__()
        self.until, self.spent, self.found = list(until), spent, []
        self._started = 0.0

    def on_train_begin(self) -> None:
        self._started = time.process_time()

    def on_batch_end(self) -> None:
        seconds = self.spent + time.process_time() - self._started
        if seconds < self.until[0]:
            return
        entry = figures(self.model)
        while self.until and seconds >= self.until[0]:
            self.found.append({"seconds": self.until.pop(0), "at": seconds, **entry})
        self.model.stop_training = not self.until
        self.spent, self._started = seconds, time.process_time()


def figures(model: Any) -> dict[str, float]:
    """Training loss, and the relative error of u on the points of the test."""
    losses = model.outputs_losses_train(*model.data.train_next_batch())[1]
    x, exact = model.data.test_x, model.data.soln(model.data.test_x)
    error = dde.metrics.l2_relative_error(exact, model.predict(x))
    return {"loss": float(losses.detach().sum()), "error": float(error), "steps": model.train_state.step}


def lbfgs(net: Any) -> torch.optim.Optimizer:
    """As DeepXDE makes it, but 20 iterations a step, so that it can be timed."""
    given = dde.optimizers.config.LBFGS_options
    tolerances = {"tolerance_grad": given["gtol"], "tolerance_change": given["ftol"]}
    return torch.optim.LBFGS(
        net.parameters(), max_iter=20, history_size=given["maxcor"], line_search_fn="strong_wolfe", **tolerances
    )


Stage = tuple[float, Callable[[Any], Any], dict[str, Any]]
SIDES: dict[str, list[Stage]] = {
    "Adam": [(1.0, lambda net: "adam", {"lr": 1e-3})],
    "L-BFGS": [(1.0, lbfgs, {})],
    "Adam, then NNCG": [(0.25, lambda net: "adam", {"lr": 1e-3}), (1.0, lambda net: "NNCG", {})],
    "`imstep.LeastSquares`": [(1.0, lambda net: imstep.LeastSquares(net.parameters()), {})],
}


def measure(problem: str, side: str, seconds: tuple[float, ...]) -> dict[str, Any]:
    """One side on one problem."""
    torch.set_num_threads(1)
    dde.config.set_default_float("float64")
    dde.config.set_random_seed(SEED)
    data, net = PROBLEMS[problem]()
    model = dde.Model(data, net)
    spent, found = 0.0, []
    for share, make, options in SIDES[side]:
        end = share * seconds[-1]
        clock = Clock(sorted({*(t for t in seconds if spent < t <= end), end}), spent)
        model.compile(make(net), verbose=0, **options)
        model.train(iterations=10**9, display_every=10**9, callbacks=[clock], verbose=0)
        spent = clock.spent
        found += [entry for entry in clock.found if entry["seconds"] in seconds]
    return {"parameters": sum(p.numel() for p in net.parameters()), "times": found}


def page(runs: dict[str, Any]) -> str:
    """The table: training loss and relative error, and the time where a single step has taken much longer."""
    times = [entry["seconds"] for entry in next(iter(runs.values()))["times"]]

    def cell(entry: dict[str, Any]) -> str:
        late = f" (at {entry['at']:.0f} s)" if entry["at"] > 1.25 * entry["seconds"] else ""
        return f"{entry['loss']:.1e} / {entry['error']:.1e}{late}"

    head = ["training loss / relative error of u", *(f"{t:g} s" for t in times)]
    return table(head, [[name, *map(cell, run["times"])] for name, run in runs.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    seconds = (0.1, 0.2, 0.4) if parser.parse_args().short else SECONDS
    runs = {f"{p}, {s}": lambda p=p, s=s: measure(p, s, seconds) for p in PROBLEMS for s in SIDES}
    if seconds != SECONDS:
        print(page({name: run() for name, run in runs.items()}))
        return
    about = {"deepxde": metadata.version("deepxde"), "seed": SEED, "dtype": "float64", "threads": 1}
    show("deepxde", "frameworks", page(complete("deepxde", about, runs)["runs"]))


if __name__ == "__main__":
    main()
