"""A loss in other units is minimised alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from imstep import LeastSquares, NewtonKrylov, methods
from imstep.optim import StepOutcome

Make = Callable[[Iterable[Any]], Any]


def _reached(make: Make, unit: float, dtype: torch.dtype, steps: int, classes: bool = False) -> float:
    """The loss after so many steps, in the given unit."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=dtype)
    y = (x[:, :1] * x[:, 1:2]).sin()
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1 + classes)).to(dtype)
    loss = lambda: unit * (cross_entropy(model(x), (y[:, 0] > 0).long()) if classes else mse_loss(model(x), y))
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.step(loss)
    return float(loss().detach()) / unit


@pytest.mark.parametrize("classes", [False, True], ids=["squares", "classes"])
@pytest.mark.parametrize("unit", [2.0**-65, 2.0**-55, 2.0**55])
@pytest.mark.parametrize(
    "make",
    [
        NewtonKrylov,
        NewtonKrylov.for_batches,
        methods.gauss_newton,
        methods.newton_cg,
        methods.trust_region,
        methods.cubic_regularization,
        methods.levenberg_marquardt,
        methods.hessian_free,
        methods.sr1,
        methods.chebyshev,
    ],
    ids=lambda make: make.__name__,
)
def test_squares_of_gradients_may_leave_the_range_of_float32(make: Make, unit: float, classes: bool) -> None:
    reached = [_reached(make, u, torch.float32, 12, classes) for u in (1.0, unit)]
    assert reached[1] < 2 * reached[0] + 0.01


@pytest.mark.parametrize("unit", [2.0**-90, 2.0**85])
@pytest.mark.parametrize(
    "make",
    [
        NewtonKrylov,
        methods.newton_cg,
        methods.newton_mr,
        methods.hessian_free,
        methods.bfgs,
        methods.lbfgs,
        methods.sr1,
        methods.lsr1,
        methods.self_scaled_broyden,
        methods.block_bfgs,
        methods.shampoo,
        methods.soap,
        methods.kl_shampoo,
    ],
    ids=lambda make: make.__name__,
)
def test_products_with_gradients_may_leave_the_range_of_float32(make: Make, unit: float) -> None:
    reached = [_reached(make, u, torch.float32, 12) for u in (1.0, unit)]
    assert reached[1] < 1.5 * reached[0] + 0.01


@pytest.mark.parametrize("unit", [1e-24, 1e-18, 1e18])
@pytest.mark.parametrize("make", [NewtonKrylov, NewtonKrylov.for_batches, LeastSquares, methods.newton_cg])
def test_a_small_loss_is_not_taken_for_a_minimum(make: Make, unit: float) -> None:
    plain, other = (_reached(make, u, torch.float64, 20) for u in (1.0, unit))
    assert other == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("make", [NewtonKrylov, LeastSquares])
def test_a_minimum_in_small_units_is_seen(make: Make) -> None:
    w, target = nn.Parameter(torch.ones(3, dtype=torch.float64)), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    optimizer, scale = make([w]), torch.tensor([1e-9, 2e-9, 3e-9], dtype=torch.float64)

    def loss() -> Tensor:
        return (scale * (w - target)).square().sum()

    outcomes = []
    while StepOutcome.CONVERGED not in outcomes and len(outcomes) < 60:
        optimizer.step(loss)
        outcomes.append(optimizer.last_step.outcome)
    assert outcomes[-1] is StepOutcome.CONVERGED
    torch.testing.assert_close(w.detach(), target, rtol=1e-9, atol=0)
