"""Densities and Gaussian processes: a few hundred parameters, to be brought to a minimum.

Sources: Dinh, Sohl-Dickstein and Bengio, ICLR 2017 (coupling layers); Vivarelli and Williams, NIPS 1998, and Rasmussen
and Williams 2006, sections 5.1 and 5.4 (covariances that learn a linear map, and their marginal likelihood).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from imstep.tasks.base import Surface
from imstep.tasks.examples import Batch, ExampleTask
from imstep.tasks.models import mlp
from imstep.tasks.sampling import grid

__all__ = ["TASKS", "CouplingFlow", "GaussianProcess", "moons_density"]

POINTS, ASIDE = 2000, 2000
BLUR = 0.1
LAYERS, WIDTH = 8, 12
INPUTS, DIRECTIONS, OBSERVATIONS = 20, 10, 512
ERROR = 0.4


class CouplingFlow(nn.Module):
    """log p(x) of points (k, 2), by affine couplings of one coordinate with the other in turn.

    A coupling maps (a, b) to (a, b exp(s(a)) + t(a)); log p is that of a normal distribution plus all s.
    """

    def __init__(self) -> None:
        super().__init__()
        couplings = [mlp((1, WIDTH, 2)) for _ in range(LAYERS)]
        with torch.no_grad():
            for coupling in couplings:
                next(coupling[-1].parameters()).mul_(0.1)  # near the identity at first
        self.couplings = nn.ModuleList(couplings)

    def forward(self, points: Tensor) -> Tensor:
        a, b = points.unbind(1)
        growth = torch.zeros_like(a)
        for coupling in self.couplings:
            s, t = coupling(a[:, None]).unbind(1)
            a, b = b * s.exp() + t, a
            growth = growth + s
        return growth - (a.square() + b.square()) / 2 - math.log(2 * math.pi)


def _arcs(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two half circles, centred and scaled to deviations of about 1; each (k, 2)."""
    scale = torch.tensor([1 / 0.87, 1 / 0.5], dtype=torch.float64)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return upper * scale, -upper * scale


def _moons(count: int, seed: int) -> Batch:
    random = Generator().manual_seed(seed)
    one, other = _arcs(math.pi * torch.rand(count, generator=random, dtype=torch.float64))
    upper = torch.rand(count, 1, generator=random) < 0.5
    points = torch.where(upper, one, other) + BLUR * torch.randn(count, 2, generator=random, dtype=torch.float64)
    return Batch(points, torch.zeros(count))


def moons_density(points: Tensor) -> Tensor:
    """The density (k,) that the points of `moons-flow` are drawn from, at (k, 2), float64."""
    angles = (torch.arange(400, dtype=torch.float64) + 0.5) * (math.pi / 400)
    distances = torch.cdist(points, torch.cat(_arcs(angles))).square()
    return torch.exp(-distances / (2 * BLUR**2)).mean(1) / (2 * math.pi * BLUR**2)


def _draw_moons(model: nn.Module) -> tuple[Surface, Surface]:
    sides, size = [(-2.5, 2.5), (-2.5, 2.5)], 81
    places = grid(sides, (size, size))
    made = model(places.to(next(model.parameters()))).double().cpu().exp()
    exact, found = (
        Surface(values.reshape(size, size).T.tolist(), ((-2.5, 2.5), (-2.5, 2.5)), ("x", "y"), "viridis")
        for values in (moons_density(places), made)
    )
    return exact, found


class GaussianProcess(nn.Module):
    """The Cholesky factor (n, n) of the covariance of observations at inputs (n, d).

        K = exp(2 a) exp(-½ ‖M (x - x')‖²) + exp(2 b) I

    with the map M, (m, d), and the logarithms a and b of the deviations of function and error to be learnt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(DIRECTIONS, INPUTS) / INPUTS)
        self.log_deviation = nn.Parameter(torch.zeros(()))
        self.log_error = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        seen = inputs @ self.map.T
        squares = seen.square().sum(1)
        distances = squares[:, None] + squares - 2 * seen @ seen.T
        covariance = (2 * self.log_deviation - distances / 2).exp()
        error = (2 * self.log_error).exp() * torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
        return torch.linalg.cholesky(covariance + error)


def _evidence(factor: Tensor, values: Tensor) -> Tensor:
    """-log p(y) / n = (½ ‖L⁻¹ y‖² + Σ log L_ii) / n + ½ log 2π."""
    whitened = torch.linalg.solve_triangular(factor, values, upper=False)
    return (whitened.square().sum() / 2 + factor.diagonal().log().sum()) / len(values) + math.log(2 * math.pi) / 2


def _observations(data: Path | None) -> tuple[Batch, Batch]:
    """A function of two directions of 20 inputs, with errors."""
    random = Generator().manual_seed(0)
    inputs = torch.randn(2 * OBSERVATIONS, INPUTS, generator=random, dtype=torch.float64)
    ways = torch.linalg.qr(torch.randn(INPUTS, 2, generator=random, dtype=torch.float64))[0]
    a, b = (inputs @ ways).unbind(1)
    values = torch.sin(2 * a) + 0.7 * b * torch.cos(a)
    values = values + ERROR * torch.randn(len(values), generator=random, dtype=torch.float64)
    every = Batch(inputs, values[:, None])
    return every.take(slice(0, OBSERVATIONS)), every.take(slice(OBSERVATIONS, None))


TASKS = (
    ExampleTask(
        "moons-flow",
        "Two moons, normalising flow",
        f"{POINTS:,} points of two blurred half circles; 8 affine couplings by tanh MLPs 1-12-2; negative log "
        "likelihood. The density that they are drawn from has 1.433 held out.",
        lambda data: (_moons(POINTS, 1), _moons(ASIDE, 2)),
        CouplingFlow,
        lambda outputs, targets: -outputs.mean(),
        unit="points",
        draw=_draw_moons,
        budget=1000.0,
    ),
    ExampleTask(
        "gaussian-process",
        "Gaussian process, marginal likelihood",
        f"{OBSERVATIONS} observations of a function of 20 inputs with errors; squared-exponential covariance of a "
        "linear map to 10 numbers, two deviations; negative log marginal likelihood an observation.",
        _observations,
        GaussianProcess,
        _evidence,
        unit="observations",
        whole=True,
        budget=500.0,
    ),
)
