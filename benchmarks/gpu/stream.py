"""Where a step lets the device wait: reads that come back to Python, by place, and what the profiler counts."""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import imstep
from benchmarks.gpu.checks import built
from benchmarks.gpu.training import WIDTHS, curves, synchronise
from benchmarks.record_page import Row
from imstep.tasks import get_task
from imstep.tasks.models import autoencoder

WARM, STEPS = 3, 3
_SOURCE = str(Path(imstep.__file__).parent)
_METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__bool__", "__int__", "__index__")
_COUNTED = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpyAsync",
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
)


class Reads:
    """Counts, as a context, what Python asks of a tensor's values: each makes it wait for a GPU.

    Attributes:
        places: where in imstep, and how often.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._before: dict[str, Any] = {}
        self._within = False

    def __enter__(self) -> Reads:
        self._before = {name: Tensor.__dict__.get(name) for name in _METHODS}
        for name in _METHODS:
            setattr(Tensor, name, self._counting(name, getattr(Tensor, name)))
        return self

    def __exit__(self, *exc: Any) -> None:
        for name, own in self._before.items():
            if own is None:
                delattr(Tensor, name)  # what PyTorch's base class has shows again
            else:
                setattr(Tensor, name, own)

    @property
    def count(self) -> int:
        """All of them."""
        return sum(self.places.values())

    def _counting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(t: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._within:  # one that another one makes
                return method(t, *args, **kwargs)
            self._within = True
            try:
                return method(t, *args, **kwargs)
            finally:
                self._within = False
                self._note(name)

        return counted

    def _note(self, name: str) -> None:
        own = [f for f in traceback.extract_stack(limit=30) if f.filename.startswith(_SOURCE)]
        where = "the closure" if not own else f"{own[-1].filename[len(_SOURCE) + 1 :]}:{own[-1].lineno}"
        self.places[f"{where} {name.strip('_')}"] += 1


# --- what is looked at ----------------------------------------------------------------------------------------------

Setting = tuple[torch.optim.Optimizer, Callable[[], Tensor]]


def newton(device: torch.device, short: bool) -> Setting:
    """The autoencoder."""
    x = curves(40 if short else 2000, device)
    torch.manual_seed(0)
    model = autoencoder((784, 8, 4) if short else WIDTHS).to(device)
    return imstep.NewtonKrylov(model.parameters()), lambda: (model(x) - x).square().mean()


def squares(device: torch.device, short: bool) -> Setting:
    """The convection equation; a small equation in the short form."""
    if short:
        network = built("physics-informed").to(device)
        return imstep.LeastSquares(network.parameters), network.closure
    problem = get_task("convection").build(0, device=device, dtype=torch.float64)
    return imstep.LeastSquares(problem.parameters), problem.closure(problem.train)


SETTINGS = {"NewtonKrylov, autoencoder": newton, "LeastSquares, convection": squares}


def profiled(made: Callable[[torch.device, bool], Setting], device: torch.device, short: bool) -> Row:
    """Counts and times a step; shares of the device's time."""
    optimizer, closure = made(device, short)
    steps = 1 if short else STEPS
    for _ in range(1 if short else WARM):
        optimizer.step(closure)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.step(closure)
        synchronise(device)
        seconds = time.perf_counter() - start
    averages = recorded.key_averages()
    counts = {event.key: event.count / steps for event in averages if event.key in _COUNTED}
    on_device = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    busy = _union([event.time_range for event in on_device if not event.name.startswith("Optimizer.")]) / 1e6
    slowest = sorted(averages, key=lambda event: -event.self_cpu_time_total)[:8]
    row: Row = {"ms a step": 1e3 * seconds / steps, **{f"{name}, a step": number for name, number in counts.items()}}
    if device.type == "cuda":
        row["share of the time in which the device idles"] = 1 - busy / seconds
    row["most of the CPU's time"] = [f"{e.key}: {e.self_cpu_time_total / 1e3 / steps:.3g} ms" for e in slowest]
    with Reads() as reads:
        optimizer.step(closure)
    row["reads in one step"] = reads.count
    row["products in that step"] = getattr(optimizer, "last_step").products  # noqa: B009 (torch's class has none)
    row["where"] = [f"{number} {place}" for place, number in reads.places.most_common(12)]
    return row


def _union(ranges: Sequence[Any]) -> float:
    """Microseconds in which at least one of the ranges of time lies."""
    total, end = 0.0, -math.inf
    for lies in sorted(ranges, key=lambda r: r.start):
        total += max(0.0, lies.end - max(lies.start, end))
        end = max(end, lies.end)
    return total


def rows(device: torch.device, short: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """A step of each."""
    for name, made in SETTINGS.items():
        yield name, partial(profiled, made, device, short)
