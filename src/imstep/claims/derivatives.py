"""The numbers: accuracy of the complex step, symmetry and completeness of the matrix, cost in time and memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.functional import mse_loss

import imstep
from imstep.claims.claim import Figure, at_least, at_most
from imstep.claims.measuring import Regression, median_seconds, peak_of
from imstep.runs.accuracy import PLATEAU_FACTOR, complex_step, forward_difference, measure, plateau
from imstep.runs.subjects import NETWORKS

__all__ = ["accuracy", "cost", "symmetry"]

_STEPS = {
    "float64": (*(10.0**-k for k in range(8, 24, 5)), *(10.0**-k for k in range(40, 300, 40)), 1e-300),
    "float32": tuple(10.0**-k for k in (4, 8, 16, 24, 30)),
}
_REAL_STEPS = tuple(10.0**-k for k in range(3, 12))


def accuracy() -> Sequence[Figure]:
    """Products by the complex step against double backward in float64, over the step h; real differences beside."""
    figures, subject = [], NETWORKS[0].subject(0)
    for dtype, decades in (("float64", 280.0), ("float32", 25.0)):
        unit = torch.finfo(getattr(torch, dtype)).eps
        errors = measure(subject, complex_step, dtype, _STEPS[dtype])
        worst = max(float("inf") if e is None else e for e in errors)
        flat = plateau(_STEPS[dtype], errors, PLATEAU_FACTOR * unit)
        figures += [
            at_most(f"worst error, {dtype}", worst, PLATEAU_FACTOR * unit),
            at_least(f"decades of h at rounding level, {dtype}", flat.decades if flat else 0.0, decades),
        ]
    real = min(e for e in measure(subject, forward_difference, "float64", _REAL_STEPS) if e is not None)
    exact = min(e for e in measure(subject, complex_step, "float64", (1e-20,)) if e is not None)
    return [*figures, at_least("best real difference / complex step", real / exact, 1e3)]


def symmetry() -> Sequence[Figure]:
    """uᵀHv beside vᵀHu, and all columns beside double backward's matrix."""
    problem = Regression((6, 10, 8, 3), 20, torch.float64)
    closure, parameters = problem.loss, problem.parameters
    matrix = imstep.Hessian(closure, parameters)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(closure(), parameters, create_graph=True)])
    flat = gradient.detach()
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    exact = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    size = len(flat)
    made = torch.stack([matrix @ unit for unit in torch.eye(size, dtype=torch.float64)], 1)
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, size, dtype=torch.float64, generator=generator)
    lack = float((u @ (matrix @ v) - v @ (matrix @ u)).abs() / (u.norm() * (matrix @ v).norm()))
    error = lambda found, right: float((found - right).norm() / right.norm())
    return [
        at_most(f"{size} columns against double backward, relative", error(made, exact), 1e-14),
        at_most("uᵀHv - vᵀHu, relative", lack, 1e-14),
        at_most("gradient, relative", error(matrix.gradient, flat), 1e-14),
    ]


def cost() -> Sequence[Figure]:
    """Time and memory of products with 0.4 million parameters, in gradients, both sides in turn on this machine."""
    problem = Regression((256, 512, 256, 256, 64), 256, torch.float32)
    closure, parameters = problem.loss, problem.parameters
    size = sum(p.numel() for p in parameters)
    v = torch.randn(size, generator=torch.Generator().manual_seed(0))
    matrix = imstep.Hessian(closure, parameters)
    gauss_newton = imstep.GaussNewton(problem.outputs, parameters, loss=mse_loss)
    kept = torch.autograd.grad(closure(), parameters, create_graph=True)
    pieces = v.split([p.numel() for p in parameters])
    parts = [part.view_as(p) for part, p in zip(pieces, parameters, strict=True)]
    works: dict[str, Callable[[], object]] = {
        "gradient": lambda: torch.autograd.grad(closure(), parameters),
        "first": lambda: imstep.Hessian(closure, parameters) @ v,
        "replayed": lambda: matrix @ v,
        "Gauss-Newton": lambda: gauss_newton @ v,
        "double backward": lambda: torch.autograd.grad(kept, parameters, parts, retain_graph=True),
    }
    seconds = median_seconds(works, rounds=15)
    unit = seconds["gradient"]
    device = torch.device("cpu")
    with _silence():
        memory, unit_memory = (peak_of(works[name], device) for name in ("first", "gradient"))
    return [
        at_most("first product, gradients", seconds["first"] / unit, 6.0),
        at_most("replayed product, gradients", seconds["replayed"] / unit, 3.5),
        at_most("replayed Gauss-Newton product, gradients", seconds["Gauss-Newton"] / unit, 2.5),
        at_most("replayed / double backward, graph kept", seconds["replayed"] / seconds["double backward"], 1.6),
        at_most("peak memory / the gradient's", memory / unit_memory, 6.0),
        at_most("peak memory / the matrix's", memory / (4.0 * size**2), 1e-3),
    ]


@contextmanager
def _silence() -> Iterator[None]:
    """Within it nothing reaches the standard error stream, to which torch's profiler writes that it begins and ends."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
