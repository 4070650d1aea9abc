"""Six small problems of different kinds, each with a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep.pde import laplacian
from imstep.tasks import Batch, ExampleTask, get_task
from imstep.tasks.data import digits
from imstep.tasks.models import mlp

F64 = torch.float64


@dataclass(frozen=True)
class Subject:
    """A problem of the comparison.

    Attributes:
        name: in the table.
        task: makes it.
        budget: gradient-equivalents of a run.
        seconds: of a run, beside the budget.
        batch: examples a step of stochastic methods; None for all.
        dtype: of parameters and data.
        least: the least loss, where the table shows the distance from it.
    """

    name: str
    task: ExampleTask
    budget: float
    seconds: float = 2.0
    batch: int | None = None
    dtype: torch.dtype = torch.float32
    least: Callable[[], float] = lambda: 0.0


# --- Rosenbrock -----------------------------------------------------------------------------------------------------

DIMENSIONS = 100


class Rosenbrock(nn.Module):
    """Residuals (10 (w_{i+1} - w_i²), 1 - w_i), (1, 198), from the standard start."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([-1.2, 1.0]).repeat(DIMENSIONS // 2))

    def forward(self, nothing: Tensor) -> Tensor:
        w = self.w
        return torch.cat([10 * (w[1:] - w[:-1].square()), 1 - w[:-1]])[None]


def sum_of_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets, reduction="sum")


def nothing(data: Path | None) -> tuple[Batch, Batch]:
    whole = Batch(torch.zeros(1, 1), torch.zeros(1, 2 * (DIMENSIONS - 1)))
    return whole, whole


# --- logistic regression ----------------------------------------------------------------------------------------------


def labelled(data: Path | None) -> tuple[Batch, Batch]:
    """Thirty features whose sizes range over a factor of a hundred; a tenth of the labels is wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 30, generator=generator, dtype=F64)
    truth = x @ torch.randn(30, 1, generator=generator, dtype=F64) > 0
    wrong = torch.rand(1500, 1, generator=generator, dtype=F64) < 0.1
    every = Batch(x * torch.logspace(0, -2, 30, dtype=F64), (truth ^ wrong).to(F64))
    return every.take(slice(0, 1000)), every.take(slice(1000, None))


def least_logistic() -> float:
    """By Newton's method, without this library."""
    batch = labelled(None)[0]
    x, y = torch.cat([batch.inputs, torch.ones(1000, 1, dtype=F64)], 1), batch.targets[:, 0]
    w = torch.zeros(31, dtype=F64)
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        w -= torch.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]), x.T @ (p - y))
    return float(F.binary_cross_entropy_with_logits(x @ w, y))


# --- a physics-informed network -------------------------------------------------------------------------------------

INTERIOR, BOUNDARY, SOLUTION = range(3)


class Poisson(nn.Module):
    """What a network u misses of -Δu = 2π² sin πx sin πy on the unit square with u = 0 around it.

    Rows are (kind, weight, x, y).
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp((2, 12, 12, 1))

    def forward(self, rows: Tensor) -> Tensor:
        kind, points = rows[:, 0], rows[:, 2:]
        exact = (math.pi * points).sin().prod(1, keepdim=True)
        inside = kind == INTERIOR
        missed = self.network(points) - exact
        if bool(inside.any()):
            curvature = laplacian(self.network, points[inside])
            missed = torch.cat([missed[~inside], -curvature - 2 * math.pi**2 * exact[inside]])
        return rows[:, 1:2] * missed


def points(data: Path | None) -> tuple[Batch, Batch]:
    """200 points inside and 40 on each side, those with weight 10; held out is the squared relative error."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, 40, dtype=F64)
    sides = [torch.stack(pair, 1) for at in (0.0, 1.0) for pair in ((t, at + 0 * t), (at + 0 * t, t))]
    around, inside = torch.cat(sides), torch.rand(200, 2, generator=generator, dtype=F64)
    train = torch.cat([_rows(BOUNDARY, 10.0, around), _rows(INTERIOR, 1.0, inside)])
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 30, dtype=F64)] * 2)
    heldout = _rows(SOLUTION, 1 / float((math.pi * grid).sin().prod(1).square().mean().sqrt()), grid)
    return Batch(train, torch.zeros(len(train), 1, dtype=F64)), Batch(heldout, torch.zeros(len(grid), 1, dtype=F64))


def _rows(kind: int, weight: float, where: Tensor) -> Tensor:
    return torch.cat([where.new_tensor([kind, weight]).expand(len(where), 2), where], 1)


# --- a recurrent network --------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Classes from the last state of a tanh network that reads a picture row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.last = nn.RNN(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.last(self.network(pictures)[0][:, -1])


def rows_of_digits(data: Path | None) -> tuple[Batch, Batch]:
    train, heldout = (Batch(part.inputs.reshape(-1, 8, 8), part.targets) for part in digits(data))
    return train.take(slice(500)), heldout


SUBJECTS = (
    Subject(
        "Rosenbrock",
        ExampleTask("rosenbrock", "Rosenbrock", "100 dimensions.", nothing, Rosenbrock, sum_of_squares),
        budget=2000,
        dtype=F64,
    ),
    Subject(
        "logistic",
        ExampleTask(
            "logistic", "Logistic regression", "1,000 examples, 30 features.", labelled, lambda: nn.Linear(30, 1),
            nn.BCEWithLogitsLoss(),
        ),
        budget=300,
        batch=250,
        dtype=F64,
        least=least_logistic,
    ),
    Subject("digits MLP", get_task("digits-mlp"), budget=300, batch=150),
    Subject("autoencoder", get_task("digits-autoencoder"), budget=150, batch=150),
    Subject(
        "PINN",
        ExampleTask("poisson", "Poisson's equation", "200 + 160 points; MLP 2-12-12-1.", points, Poisson, nn.MSELoss()),
        budget=400,
        dtype=F64,
    ),
    Subject(
        "RNN",
        ExampleTask(
            "digit-rows", "Digits row by row", "500 digits; tanh RNN 8-16-10.", rows_of_digits, Recurrent,
            nn.CrossEntropyLoss(),
        ),
        budget=300,
        batch=100,
    ),
)  # fmt: skip
