"""The nonlinear regressions of NIST's Statistical Reference Datasets, each from its two starts.

f(b) = Σ (y_i - model(b, x_i))²

Source: data, starts and certified values of the National Institute of Standards and Technology, in the public domain,
https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml; they stand in nist.json, in the order of the models here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

F64 = torch.float64
Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Regression:
    """A model and what was observed.

    Attributes:
        name: of the set.
        model: parameters (p,) and x (N,) or (k, N) -> (N,).
        x, y: observations, float64.
        starts: far from the minimum, and near it; (p,) each.
        certified: the minimiser (p,), to 11 digits.
        squares: f there.
    """

    name: str
    model: Model
    x: Tensor
    y: Tensor
    starts: tuple[Tensor, Tensor]
    certified: Tensor
    squares: float

    def residuals(self, b: Tensor) -> Tensor:
        """(N,)."""
        return self.y - self.model(b, self.x)

    def __call__(self, b: Tensor) -> Tensor:
        return self.residuals(b).square().sum()

    def digits(self, b: Tensor) -> float:
        """How many digits of all parameters are right: -log10 of the largest relative error, 0 to 11."""
        error = float(((b - self.certified) / self.certified).abs().max())
        return 0.0 if not error < 1 else min(-math.log10(max(error, 1e-11)), 11.0)


def _saturation(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - (-b[1] * x).exp())


def _rational(degree: int) -> Model:
    """A polynomial over another of the same degree that is 1 at 0."""

    def model(b: Tensor, x: Tensor) -> Tensor:
        powers = torch.stack([x**k for k in range(degree + 1)])
        return (b[: degree + 1] @ powers) / (1 + b[degree + 1 :] @ powers[1:])

    return model


def _peaks(b: Tensor, x: Tensor) -> Tensor:
    peak = lambda height, centre, width: height * (-((x - centre) ** 2) / width**2).exp()
    return b[0] * (-b[1] * x).exp() + peak(b[2], b[3], b[4]) + peak(b[5], b[6], b[7])


def _decays(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (-b[1] * x).exp() + b[2] * (-b[3] * x).exp() + b[4] * (-b[5] * x).exp()


def _thinning(b: Tensor, x: Tensor) -> Tensor:
    return (-b[0] * x).exp() / (b[1] + b[2] * x)


def _cycles(b: Tensor, x: Tensor) -> Tensor:
    wave = lambda cosine, sine, period: (
        cosine * (2 * math.pi * x / period).cos() + sine * (2 * math.pi * x / period).sin()
    )
    return b[0] + wave(b[1], b[2], 12) + wave(b[4], b[5], b[3]) + wave(b[7], b[8], b[6])


_MODELS: dict[str, Model] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": _saturation,
    "Chwirut1": _thinning,
    "Chwirut2": _thinning,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": _cycles,
    "Eckerle4": lambda b, x: b[0] / b[1] * (-0.5 * ((x - b[2]) / b[1]) ** 2).exp(),
    "Gauss1": _peaks,
    "Gauss2": _peaks,
    "Gauss3": _peaks,
    "Hahn1": _rational(3),
    "Kirby2": _rational(2),
    "Lanczos1": _decays,
    "Lanczos2": _decays,
    "Lanczos3": _decays,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * (b[1] / (x + b[2])).exp(),
    "MGH17": lambda b, x: b[0] + b[1] * (-x * b[3]).exp() + b[2] * (-x * b[4]).exp(),
    "Misra1a": _saturation,
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[0] * (-b[2] * x[1]).exp(),
    "Rat42": lambda b, x: b[0] / (1 + (b[1] - b[2] * x).exp()),
    "Rat43": lambda b, x: b[0] / (1 + (b[1] - b[2] * x).exp()) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - (b[2] / (x - b[3])).atan() / math.pi,
    "Thurber": _rational(3),
}


def _regressions() -> tuple[Regression, ...]:
    observed = json.loads((Path(__file__).parent / "data.json").read_text(encoding="utf-8"))
    vector = lambda values: torch.tensor(values, dtype=F64)
    found = []
    for name, model in _MODELS.items():
        of = observed[name]
        y = vector(of["y"]).log() if name == "Nelson" else vector(of["y"])
        first, second = map(vector, of["starts"])
        found.append(
            Regression(name, model, vector(of["x"]), y, (first, second), vector(of["certified"]), of["squares"])
        )
    return tuple(found)


REGRESSIONS = _regressions()
"""All 27."""
