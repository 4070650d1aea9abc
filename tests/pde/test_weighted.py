"""Points by residuals with weights: means against integrals in closed form, and how points lie against the density."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from imstep import LeastSquares, pde

F64 = torch.float64
SIDES = [(-1.0, 2.0), (0.0, 0.5)]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def bump(x: Tensor) -> Tensor:
    """Large in a hundredth of the box."""
    return torch.exp(-((x[:, :1] - 0.4) / 0.01) ** 2)


@pytest.mark.parametrize(("count", "options"), [(1, {}), (7, {}), (40, {"power": 1.0, "floor": 0.0, "rounds": 3})])
def test_means_are_those_over_the_box_however_few_the_points(count: int, options: dict[str, Any]) -> None:
    f = lambda x: x[:, :1].exp() * torch.cos(3 * x[:, 1:])
    exact = (math.exp(2) - math.exp(-1)) / 3 * (math.sin(1.5) / 3) / 0.5
    means = []
    for seed in range(30):
        x, weights = pde.weighted_points(bump, SIDES, count, generator=seeded(seed), dtype=F64, **options)
        assert float(weights.mean()) == pytest.approx(1, abs=1e-12)  # the boxes make up the whole
        means.append((weights * f(x)).mean())
    of = torch.stack(means)
    assert abs(float(of.mean()) - exact) < 4 * float(of.std()) / math.sqrt(len(means))


def test_points_are_as_dense_as_is_asked_for_and_one_lies_in_each_part() -> None:
    """Density ∝ 5 x⁴ + 1/2 on [0, 1], of which 3/2 is the integral; independent points would differ by up to 0.03."""
    square = lambda x: x[:, :1] ** 2
    x, weights = pde.weighted_points(square, [(0.0, 1.0)] * 2, 1000, floor=0.5, generator=seeded(0), dtype=F64)
    for upper in (0.3, 0.5, 0.8, 0.9):
        expected = (upper**5 + 0.5 * upper) / 1.5
        assert float((x[:, 0] < upper).double().mean()) == pytest.approx(expected, abs=0.015)
    inside = (x > 0.25).all(1) & (x < 0.75).all(1)
    density = (5 * x[:, :1] ** 4 + 0.5) / 1.5
    assert float((weights * density)[inside].mean()) == pytest.approx(1, abs=0.1)
    even, ones = pde.weighted_points(lambda x: 0 * x, [(0.0, 1.0)] * 2, 256, generator=seeded(0), dtype=F64)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    assert (even[:, 0] * 16).floor().mul(16).add((even[:, 1] * 16).floor()).unique().numel() == 256


def test_a_mean_is_known_far_better_than_by_independent_points() -> None:
    layer = lambda x: torch.exp(-((x[:, :1] - 0.4) / 0.03) ** 2)
    exact = 0.03 * math.sqrt(math.pi / 2) / 3  # of the square
    errors = []
    for seed in range(10):
        x, weights = pde.weighted_points(layer, SIDES, 1000, generator=seeded(seed), dtype=F64)
        errors.append(float((weights * layer(x).square()).mean()) / exact - 1)
    independent = math.sqrt(0.03 * math.sqrt(math.pi / 4) / 3 / exact**2 / 1000)  # one deviation of a relative error
    assert math.sqrt(sum(e**2 for e in errors) / len(errors)) < independent / 5


def test_seeds_types_and_shapes() -> None:
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64)
    residual = lambda x: pde.laplacian(network, x.double()) + 1
    x, weights = pde.weighted_points(residual, SIDES, 30, generator=seeded(3), dtype=F64)
    again, rounded = (pde.weighted_points(residual, SIDES, 30, generator=seeded(3), dtype=t) for t in (F64, None))
    assert torch.equal(x, again[0])
    assert torch.equal(weights, again[1])
    assert rounded[0].dtype == rounded[1].dtype == torch.float32
    torch.testing.assert_close(rounded[0].double(), x, rtol=1e-3, atol=1e-3)
    assert not x.requires_grad
    assert not weights.requires_grad
    assert x.shape == (30, 2)
    assert weights.shape == (30, 1)
    _, flat = pde.weighted_points(lambda x: bump(x)[:, 0], SIDES, 30)
    assert flat.shape == (30,)
    _, deep = pde.weighted_points(lambda x: bump(x)[..., None], SIDES, 30)
    assert deep.shape == (30, 1, 1)
    face, _ = pde.weighted_points(bump, [(-1.0, 2.0), (0.5, 0.5)], 100, generator=seeded(0))
    assert bool((face[:, 1] == 0.5).all())
    assert float(((face[:, 0] - 0.4).abs() < 0.03).double().mean()) > 0.15


def test_residuals_that_are_not_finite_count_as_the_largest() -> None:
    pole = lambda x: torch.where(x[:, :1] > 1.9, math.inf, 0.1 + 0 * x[:, :1])
    x, weights = pde.weighted_points(pole, SIDES, 200, generator=seeded(0))
    assert bool(x.isfinite().all())
    assert bool(weights.isfinite().all())
    nothing, ones = pde.weighted_points(lambda x: x / 0 * 0, SIDES, 20)
    assert bool(nothing.isfinite().all())
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_a_step_of_least_squares_takes_the_weights() -> None:
    """As if the roots of weights were in the residuals."""
    losses = []
    for weigh in (lambda r, w: (w * r.square()).mean(), lambda r, w: (w.sqrt() * r).square().mean()):
        torch.manual_seed(0)
        u = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64)
        residual = lambda x, u=u: pde.laplacian(u, x) + bump(x)
        optimizer = LeastSquares(u.parameters())
        for seed in range(3):
            x, weights = pde.weighted_points(residual, SIDES, 20, generator=seeded(seed), dtype=F64)
            optimizer.step(lambda w=weigh, x=x, weights=weights, residual=residual: w(residual(x), weights))
            losses.append(optimizer.last_step.new_loss)
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-9)
    assert losses[2] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count, candidates and rounds"),
        ({"rounds": 0}, "count, candidates and rounds"),
        ({"power": 0.0}, "power is positive"),
        ({"floor": -1.0}, "floor at least 0"),
        ({"sides": [(1.0, 0.0)]}, "the least and the largest"),
        ({"sides": (0.0, 1.0)}, "the least and the largest"),
        ({"sides": [(0.0, math.inf)]}, "finite"),
        ({"residual": lambda x: x.square().mean()}, "not a mean over all"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"residual": lambda x: x, "sides": [(0.0, 1.0)], "count": 3, **options}
    with pytest.raises(ValueError, match=message):
        pde.weighted_points(**given)
