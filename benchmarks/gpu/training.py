"""Training for a fixed time: physics-informed networks by LeastSquares, a deep autoencoder beside SOAP."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

import imstep
from benchmarks.record_page import Row
from imstep.methods import soap
from imstep.tasks import PhysicsProblem, get_task
from imstep.tasks.models import autoencoder

POINTS = 10  # of a course


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(step: Callable[[], Any], error: Callable[[], float], device: torch.device, seconds: float) -> Row:
    """Steps for a time, that of measuring the error left out; the error ten times on the way.

    Stops after one step where even that takes longer.
    """
    taken: list[float] = []
    course = [(0.0, error())]
    while (spent := sum(taken)) < seconds:
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        taken.append(time.perf_counter() - start)
        if sum(taken) * POINTS // seconds > spent * POINTS // seconds:
            course.append((sum(taken), error()))
    return {
        "steps": len(taken),
        "seconds": sum(taken),
        "ms a step": 1e3 * statistics.median(taken),
        "error at the start": course[0][1],
        "error": course[-1][1],
        "course": [f"{at:.3g} s: {value:.3g}" for at, value in course],
    }


def physics(name: str, dtype: torch.dtype, device: torch.device, seconds: float) -> Row:
    """Error of the solution of a physics-informed task, with new points in every step."""
    problem = get_task(name).build(0, device=device, dtype=dtype)
    assert isinstance(problem, PhysicsProblem)
    optimizer, points, epochs = imstep.LeastSquares(problem.parameters), problem.growing(), count()

    def step() -> None:
        epoch = next(epochs)
        drawn = next(problem.batches(epoch)) if points is None else problem.drawn(epoch, 0, points.count)
        optimizer.step(problem.closure(drawn))
        if points is not None and optimizer.last_step is not None:
            points.observe(optimizer.last_step)

    return train(step, lambda: problem.evaluate(problem.heldout).loss, device, seconds)


# --- autoencoder ----------------------------------------------------------------------------------------------------

WIDTHS = (784, 1000, 500, 250, 30)
_HELD_OUT = 10


def curves(count: int, device: torch.device, side: int = 28) -> Tensor:
    """Pictures of curves of second order through random points, as in Hinton and Salakhutdinov's synthetic data."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(count, 3, 2, generator=generator).to(device)
    t = torch.linspace(0, 1, 24, device=device)
    weights = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], 1)
    places = torch.linspace(0, 1, side, device=device)
    grid = torch.cartesian_prod(places, places)
    pictures = [
        torch.exp(-torch.cdist(grid.expand(len(part), -1, -1), weights @ part).square().amin(2) / (2 * 0.04**2))
        for part in ends.split(500)
    ]
    return torch.cat(pictures)


def _method(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """By name; SOAP's followed by a package and a rate."""
    if name == "NewtonKrylov":
        return imstep.NewtonKrylov(params)
    if name == "NewtonKrylov.for_batches":
        return imstep.NewtonKrylov.for_batches(params)
    package, rate = name.removeprefix("SOAP of ").split(", lr ")
    if package == "imstep":
        return soap(params, lr=float(rate))
    from pytorch_optimizer import SOAP

    found: torch.optim.Optimizer = SOAP(params, lr=float(rate))
    return found


def reconstruction(method: str, pictures: Tensor, batch: int | None, seconds: float) -> Row:
    """Mean squared error of pictures held out; in float32."""
    device, held_out = pictures.device, pictures[::_HELD_OUT]
    trained = pictures[torch.arange(len(pictures), device=device) % _HELD_OUT != 0]
    torch.manual_seed(0)
    model = autoencoder(WIDTHS if len(pictures) > 1000 else (784, 16, 4)).to(device)
    params = list(model.parameters())
    optimizer, generator = _method(method, params), torch.Generator(device).manual_seed(0)

    def step() -> None:
        x = trained
        if batch is not None:
            x = trained[torch.randint(len(trained), (batch,), generator=generator, device=device)]

        def loss() -> Tensor:
            return (model(x) - x).square().mean()

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(loss if method.startswith("Newton") else closure)

    @torch.no_grad()
    def error() -> float:
        return float((model(held_out) - held_out).square().mean())

    row = train(step, error, device, seconds)
    with torch.no_grad():
        row["loss"] = float((model(trained) - trained).square().mean())
    return row


PHYSICS = (
    ("poisson-5d-wide", torch.float64, 40.0),
    ("convection", torch.float64, 32.0),
    ("convection", torch.float32, 16.0),
)


def physics_rows(device: torch.device, short: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The convection equation in both precisions, and Poisson's in five dimensions with a wide network."""
    for name, dtype, seconds in PHYSICS[1:2] if short else PHYSICS:
        shown = f"{name}, {str(dtype).removeprefix('torch.')}"
        yield shown, partial(physics, name, dtype, device, 1e-3 if short else seconds)


def autoencoder_rows(device: torch.device, short: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Newton-Krylov's methods and SOAP at several rates, each for the same time."""
    pictures = curves(200 if short else 20_000, device)
    runs: list[tuple[str, int | None]] = [("NewtonKrylov", None), ("NewtonKrylov.for_batches", 2000)]
    runs += [("SOAP of imstep, lr 3e-3", 500)]
    runs += [(f"SOAP of pytorch_optimizer, lr {rate}", 500) for rate in ("1e-3", "3e-3", "1e-2")]
    for method, batch in runs[1:3] if short else runs:
        yield method, partial(reconstruction, method, pictures, batch, 1e-3 if short else 8.0)
