"""Problems for comparing step lengths: small, deterministic, on the full batch, from random starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep.optim import ExactHessian, NoPreconditioning

Closure = Callable[[], Tensor]
F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """A loss to be lowered to a target.

    Attributes:
        description: for the page.
        target: the loss to reach.
        budget: gradient-equivalents after which a run has failed.
        make: the parameters and the closure, from a seed for the start.
        options: of the optimizer, for all sides.
    """

    description: str
    target: float
    budget: float
    make: Callable[[int], tuple[list[nn.Parameter], Closure]]
    options: dict[str, Any] = field(default_factory=dict)


def _rosenbrock(seed: int) -> tuple[list[nn.Parameter], Closure]:
    noise = torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=F64)
    x = nn.Parameter(1 + noise.abs())
    return [x], lambda: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@cache
def _breast_cancer() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x, y = torch.tensor(data.data, dtype=F64), torch.tensor(data.target, dtype=F64)
    return (x - x.mean(0)) / x.std(0), y


def _logistic(seed: int) -> tuple[list[nn.Parameter], Closure]:
    x, y = _breast_cancer()
    model = _seeded(seed, lambda: nn.Linear(30, 1).to(F64))
    with torch.no_grad():
        model.weight.mul_(20)  # a start from which a full Newton step overshoots
    penalty = lambda: 5e-5 * sum((p**2).sum() for p in model.parameters())
    return list(model.parameters()), lambda: F.binary_cross_entropy_with_logits(model(x)[:, 0], y) + penalty()


@cache
def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images[:500].reshape(500, 64) / 16, dtype=torch.float32)


def _autoencoder(seed: int) -> tuple[list[nn.Parameter], Closure]:
    x = _digits()
    model = _seeded(seed, lambda: _mlp(64, 32, 8, 32, 64))
    return list(model.parameters()), lambda: F.mse_loss(torch.sigmoid(model(x)), x)


@cache
def _diabetes() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x, y = torch.tensor(data.data, dtype=F64), torch.tensor(data.target, dtype=F64)
    return x / x.std(0), ((y - y.mean()) / y.std())[:, None]


def _regression(seed: int) -> tuple[list[nn.Parameter], Closure]:
    x, y = _diabetes()
    model = _seeded(seed, lambda: _mlp(10, 20, 20, 1).to(F64))
    return list(model.parameters()), lambda: F.mse_loss(model(x), y)


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


PROBLEMS = {
    "rosenbrock": Problem(
        "Rosenbrock's function of 100 variables, from 1 + |N(0, 1)|, float64, the Hessian without preconditioner",
        1e-8,
        4000,
        _rosenbrock,
        {"curvature": ExactHessian(), "preconditioning": NoPreconditioning()},
    ),
    "logistic": Problem(
        "logistic regression, breast cancer (569 x 30), L2 5e-5, float64; 1e-8 above the minimum",
        0.042665829,
        1000,
        _logistic,
    ),
    "autoencoder": Problem(
        "autoencoder 64-32-8-32-64, 500 digits, mean squared error, float32", 5.5e-3, 2000, _autoencoder
    ),
    "regression": Problem(
        "MLP 10-20-20-1, diabetes (442 x 10), mean squared error, float64", 1e-6, 1500, _regression
    ),
}
