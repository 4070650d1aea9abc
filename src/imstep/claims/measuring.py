"""Peak memory, times side by side, small networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

__all__ = ["Regression", "fitted_order", "median_seconds", "peak_of", "slope"]


def peak_of(work: Callable[[], Any], device: torch.device) -> int:
    """Peak of the bytes held by PyTorch's allocator while ``work`` runs, above those held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def median_seconds(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each, all in turn in every round; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for at in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            kept = work()
            if at:
                times[name].append(time.perf_counter() - start)
            del kept
    return {name: statistics.median(found) for name, found in times.items()}


class Regression:
    """A tanh network and random numbers that it is fitted to.

    Args:
        widths: of its layers, inputs and outputs among them.
        examples: how many.
        dtype: of network and numbers.
        seed: of both.
    """

    def __init__(self, widths: Sequence[int], examples: int, dtype: torch.dtype, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for fan_in, fan_out in pairwise(widths):
                layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
            self.model = nn.Sequential(*layers[:-1]).to(dtype)
            self._x, self._y = (torch.randn(examples, n).to(dtype) for n in (widths[0], widths[-1]))
        self.parameters = list(self.model.parameters())

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets."""
        return self.model(self._x), self._y

    def loss(self) -> Tensor:
        """Their mean squared difference."""
        return nn.functional.mse_loss(*self.outputs())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares.

    >>> round(slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]), 6)
    2.0
    """
    u, v = (torch.tensor(values, dtype=torch.float64) for values in (x, y))
    u, v = u - u.mean(), v - v.mean()
    return float((u @ v) / (u @ u))


def fitted_order(norms: Sequence[float]) -> float:
    """p of ‖g'‖ ~ C ‖g‖^p over the last four gradients above rounding.

    >>> round(fitted_order([1e-1, 1e-2, 1e-4, 1e-8]), 6)
    2.0
    """
    usable = [g for g in norms if g > 1e-15 * max(norms[0], 1)]
    logs = torch.tensor(usable[-4:], dtype=torch.float64).log().tolist()
    return slope(logs[:-1], logs[1:])
