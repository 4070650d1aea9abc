"""The figure that made the complex step famous: error of a Hessian product over the step h.

A real difference of gradients trades truncation (h too large) against cancellation (h too small): a V.
The complex step subtracts nothing, so its error falls to rounding level and stays there until h underflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

from imstep.runs.environment import environment
from imstep.runs.subjects import NETWORKS, Scalar, Subject

__all__ = [
    "METHODS",
    "AccuracyResult",
    "Curve",
    "Plateau",
    "measure",
    "measure_accuracy",
    "plateau",
    "steps_of",
]

FORMAT = "imstep-accuracy/1"
PLATEAU_FACTOR = 32.0
"""Rounding level is 32 units of roundoff: a few for the reference, a few for each sum in a product."""

Method = Callable[[Scalar, torch.Tensor, torch.Tensor, float], torch.Tensor]


def _gradient(loss: Scalar, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


def complex_step(loss: Scalar, x: torch.Tensor, v: torch.Tensor, h: float) -> torch.Tensor:
    """Im ∇f(x + ihv) / h in finite complex arithmetic: `imstep.hvp(f, x, v, h=h)`."""
    import imstep

    return imstep.hvp(loss, x, v, h=h)


def forward_difference(loss: Scalar, x: torch.Tensor, v: torch.Tensor, h: float) -> torch.Tensor:
    """(∇f(x + hv) - ∇f(x)) / h: truncation O(h), cancellation O(u/h)."""
    return (_gradient(loss, x + h * v) - _gradient(loss, x)) / h


def central_difference(loss: Scalar, x: torch.Tensor, v: torch.Tensor, h: float) -> torch.Tensor:
    """(∇f(x + hv) - ∇f(x - hv)) / 2h: truncation O(h²), cancellation O(u/h)."""
    return (_gradient(loss, x + h * v) - _gradient(loss, x - h * v)) / (2 * h)


METHODS: dict[str, Method] = {
    "complex step": complex_step,
    "central difference": central_difference,
    "forward difference": forward_difference,
}
_DTYPES = {"float64": (torch.float64, 300), "float32": (torch.float32, 38)}


def steps_of(dtype: str) -> tuple[float, ...]:
    """The steps h that are tried: every half decade to 1e-20, then every four; down to 1e-300 or 1e-38."""
    smallest = _DTYPES[dtype][1]
    fine = [10.0 ** (-k / 2) for k in range(2, 41)]
    coarse = [10.0**-k for k in range(24, smallest, 4)] + [10.0**-smallest]
    return tuple(fine + coarse)


@dataclass(frozen=True)
class Plateau:
    """The longest run of tried steps whose error is at rounding level (<= 32 units of roundoff)."""

    largest_h: float
    smallest_h: float
    worst_error: float

    @property
    def decades(self) -> float:
        return math.log10(self.largest_h / self.smallest_h) if self.smallest_h else math.inf


@dataclass(frozen=True)
class Curve:
    """Error over h of one method; an error that is not finite is None (the product overflowed)."""

    network: str
    dtype: str
    method: str
    steps: tuple[float, ...]
    errors: tuple[float | None, ...]

    @property
    def best(self) -> tuple[float, float]:
        """(h, error) where the error is least; (nan, nan) if no product was finite."""
        pairs = [(e, h) for h, e in zip(self.steps, self.errors, strict=True) if e is not None]
        error, h = min(pairs, default=(math.nan, math.nan))
        return h, error

    @property
    def plateau(self) -> Plateau | None:
        unit = torch.finfo(getattr(torch, self.dtype)).eps
        return plateau(self.steps, self.errors, PLATEAU_FACTOR * unit)


def plateau(steps: Iterable[float], errors: Iterable[float | None], tolerance: float) -> Plateau | None:
    """The longest run of consecutive steps with error <= tolerance; None if there is no such step.

    >>> plateau([1e-1, 1e-2, 1e-3, 1e-4], [1.0, 1e-9, 2e-9, None], 1e-8).decades
    1.0
    """
    runs: list[list[tuple[float, float]]] = [[]]
    for h, error in zip(steps, errors, strict=True):
        if error is not None and error <= tolerance:
            runs[-1].append((h, error))
        else:
            runs.append([])
    longest = max(runs, key=lambda run: run[0][0] / run[-1][0] if run else 0.0)
    if not longest:
        return None
    return Plateau(longest[0][0], longest[-1][0], max(error for _, error in longest))


def measure(subject: Subject, method: Method, dtype: str, steps: Iterable[float]) -> tuple[float | None, ...]:
    """‖method - reference‖ / ‖reference‖ for every h, the reference being double backward in float64.

    Args:
        subject: function, point and direction.
        method: `method(loss, x, v, h)` -> (n,), evaluated in `dtype`.
        dtype: "float64" or "float32".
        steps: values of h.
    """
    kind = _DTYPES[dtype][0]
    reference = subject.reference()
    loss, x, v = subject.loss_in(kind), subject.point.to(kind), subject.direction.to(kind)

    def error(h: float) -> float | None:
        product = method(loss, x, v, h).double()
        relative = float((product - reference).norm() / reference.norm())
        return relative if math.isfinite(relative) else None

    return tuple(error(h) for h in steps)


@dataclass(frozen=True)
class AccuracyResult:
    """All curves of a measurement, with what is needed to repeat it."""

    seed: int
    curves: tuple[Curve, ...]
    environment: dict[str, str]

    def select(self, network: str, dtype: str) -> list[Curve]:
        return [c for c in self.curves if (c.network, c.dtype) == (network, dtype)]

    def to_dict(self) -> dict[str, object]:
        """JSON-able; the layout is in `accuracy_report.save_accuracy`."""
        return {
            "format": FORMAT,
            "seed": self.seed,
            "environment": self.environment,
            "reference": "double backward in float64",
            "plateau_tolerance": f"{PLATEAU_FACTOR:g} units of roundoff",
            "curves": [_curve_dict(curve) for curve in self.curves],
        }


def _curve_dict(curve: Curve) -> dict[str, object]:
    flat, (h, error) = curve.plateau, curve.best
    return asdict(curve) | {
        "best": None if math.isnan(error) else {"h": h, "error": error},
        "plateau": None if flat is None else asdict(flat) | {"decades": round(flat.decades, 2)},
    }


def measure_accuracy(*, seed: int = 0, progress: Callable[[str], None] = lambda _: None) -> AccuracyResult:
    """Every method on every network in float64 and float32 (about ten seconds).

    Args:
        seed: decides weights, data and directions.
        progress: called with a line before each curve.
    """
    curves = []
    for network in NETWORKS:
        subject = network.subject(seed)
        for dtype in _DTYPES:
            for name, method in METHODS.items():
                progress(f"{network.name}, {dtype}: {name}")
                steps = steps_of(dtype)
                curves.append(Curve(network.name, dtype, name, steps, measure(subject, method, dtype, steps)))
    return AccuracyResult(seed, tuple(curves), environment())
