"""The figure that made the complex step famous: error of a Hessian product over the step h.

A real difference of gradients trades truncation (h too large) against cancellation (h too small): a V. The complex
step subtracts nothing, so its error falls to rounding level and stays there until h underflows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from imstep.bench.environment import environment, write_atomically

__all__ = [
    "METHODS",
    "NETWORKS",
    "AccuracyResult",
    "Curve",
    "Network",
    "Plateau",
    "Subject",
    "measure",
    "measure_accuracy",
    "plateau",
    "save_accuracy",
    "steps_of",
]

FORMAT = "imstep-accuracy/1"
PLATEAU_FACTOR = 32.0
"""Rounding level is 32 units of roundoff: a few for the reference, a few for each sum in a product."""

Scalar = Callable[[torch.Tensor], torch.Tensor]
Method = Callable[[Scalar, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A scalar function of a flat vector, a point and a direction: the product H(point) direction is measured.

    Args:
        loss: maps a point (n,) to a 0-dim tensor; made for any dtype by `loss_in`.
        point: (n,), float64 values that are exact in float32.
        direction: (n,), likewise.
    """

    loss_in: Callable[[torch.dtype], Scalar]
    point: torch.Tensor
    direction: torch.Tensor

    def reference(self) -> torch.Tensor:
        """H(point) direction by double backward in float64, shape (n,)."""
        x = self.point.double().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss_in(torch.float64)(x), x, create_graph=True)
        (product,) = torch.autograd.grad(gradient, x, self.direction.double())
        return product


@dataclass(frozen=True)
class Network:
    """A small network whose loss is the subject of a measurement."""

    name: str
    title: str
    model: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int
    examples: int = 16

    def subject(self, seed: int) -> Subject:
        """Weights, data and direction drawn from `seed`, all exact in float32 so that both dtypes see one point."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model().eval()
            inputs = torch.randn(self.examples, *self.input_shape)
            targets = torch.randint(self.classes, (self.examples,))
            point = nn.utils.parameters_to_vector(model.parameters()).detach()
            direction = torch.randn_like(point)
        shapes = {name: p.shape for name, p in model.named_parameters()}

        def loss_in(dtype: torch.dtype) -> Scalar:
            data = inputs.to(dtype)

            def loss(x: torch.Tensor) -> torch.Tensor:
                pieces = x.split([shape.numel() for shape in shapes.values()])
                weights = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
                return nn.functional.cross_entropy(functional_call(model, weights, (data,)), targets)

            return loss

        return Subject(loss_in, point.double(), direction.double())


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


NETWORKS = (
    Network("mlp", "tanh MLP 16-24-24-5, cross entropy", _mlp, (16,), 5),
    Network("conv", "conv net, 4 and 8 channels, cross entropy", _convolutional, (1, 8, 8), 5),
)


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
        """JSON-able; the layout is in `save_accuracy`."""
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


def measure_accuracy(
    *,
    seed: int = 0,
    networks: Iterable[Network] = NETWORKS,
    methods: dict[str, Method] = METHODS,
    progress: Callable[[str], None] = lambda _: None,
) -> AccuracyResult:
    """Every method on every network in float64 and float32 (about ten seconds).

    Args:
        seed: decides weights, data and directions.
        networks: what is differentiated.
        methods: name -> method; exchangeable for tests.
        progress: called with a line before each curve.
    """
    curves = []
    for network in networks:
        subject = network.subject(seed)
        for dtype in _DTYPES:
            for name, method in methods.items():
                progress(f"{network.name}, {dtype}: {name}")
                steps = steps_of(dtype)
                curves.append(Curve(network.name, dtype, name, steps, measure(subject, method, dtype, steps)))
    return AccuracyResult(seed, tuple(curves), environment())


def save_accuracy(result: AccuracyResult, out: Path) -> tuple[Path, Path]:
    """Write `accuracy.json` and `accuracy.png` into `out` (made if it is not there); returns both paths.

    JSON: format, seed, environment, reference, plateau_tolerance, curves: a list of {network, dtype, method,
    steps: [h], errors: [relative error or null], best: {h, error}, plateau: {largest_h, smallest_h, worst_error,
    decades} or null}.
    """
    from imstep.bench.plots import accuracy_figure, save_png

    out.mkdir(parents=True, exist_ok=True)
    record, figure = out / "accuracy.json", out / "accuracy.png"
    write_atomically(record, json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    save_png(accuracy_figure(result), figure)
    return record, figure
