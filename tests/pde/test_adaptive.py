"""Points drawn by residuals: frequencies against the probabilities that are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from imstep import pde

F64 = torch.float64


def test_frequencies_are_those_of_the_formula() -> None:
    """Few of many points, so that drawing none twice changes little."""
    x = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    residual = lambda x: x[:, :1] ** 2
    drawn = pde.adaptive_points(residual, x, 2000, power=2.0, floor=0.5, generator=torch.Generator().manual_seed(1))
    # density ∝ 5 x⁴ + 1/2 on [0, 1], of which 3/2 is the integral
    for upper in (0.5, 0.8, 0.9):
        expected = (upper**5 + 0.5 * upper) / 1.5
        assert float((drawn[:, 0] < upper).double().mean()) == pytest.approx(expected, abs=0.035)
    assert float(drawn[:, 1].mean()) == pytest.approx(0.5, abs=0.03)
    assert len(drawn.unique(dim=0)) == 2000


def test_components_count_by_their_norm_and_a_generator_repeats_the_draw() -> None:
    x = torch.linspace(0, 1, 50, dtype=F64)[:, None]
    both = lambda x: torch.cat([3 * x, 4 * x], 1)
    draws = [
        pde.adaptive_points(residual, x, 10, floor=0.0, generator=torch.Generator().manual_seed(3))
        for residual in (both, lambda x: -x[:, 0])
    ]
    assert torch.equal(*draws)
    everything = pde.adaptive_points(lambda x: 0 * x, x, 50, floor=0.0)  # nothing is missed: all alike
    assert torch.equal(everything.sort(0).values, x)


def test_residuals_of_a_network() -> None:
    u = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64)
    x = torch.rand(200, 2, dtype=F64)
    drawn = pde.adaptive_points(lambda x: pde.laplacian(u, x) + 1, x, 30)
    assert drawn.shape == (30, 2)
    assert not drawn.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 11}, "between 1 and the number of candidates, 10"),
        ({"power": 0.0}, "power is positive"),
        ({"floor": -1.0}, "floor at least 0"),
        ({"residual": lambda x: x.square().mean()}, "not a mean over all"),
        ({"residual": lambda x: x / 0}, "not finite"),
        ({"residual": lambda x: x > 0.5, "floor": 0.0, "count": 9}, "Give a positive floor"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"residual": lambda x: x, "candidates": torch.linspace(0, 1, 10)[:, None], "count": 3, **options}
    with pytest.raises(ValueError, match=message):
        pde.adaptive_points(**given)
