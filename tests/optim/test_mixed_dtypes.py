"""Losses of another dtype than parameters, whose rounding is that of the coarser of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from imstep import LeastSquares, NewtonKrylov
from imstep.curvature import ResidualJacobian

F32, F64 = torch.float32, torch.float64


def network(dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).to(dtype)


def test_a_fit_of_doubles_by_floats_ends_in_rounding():
    """As with targets from NumPy: steps below the rounding of parameters are rejected, and no sign of a stale loss."""
    model = network(F32)
    x = torch.linspace(-1, 1, 60)[:, None]
    y = torch.sin(4 * x).double()
    optimizer = LeastSquares(model.parameters())
    for _ in range(60):
        value = optimizer.step(lambda: (model(x) - y).square().mean())
    assert value.dtype is F64
    assert value < 1e-9


@pytest.mark.parametrize("make", [LeastSquares, NewtonKrylov])
def test_terms_of_two_dtypes(make):
    one, other = network(F32), network(F64, seed=1)
    x = torch.linspace(0, 1, 20)[:, None]

    def closure() -> Tensor:
        loss = 0.5  # a constant beside squares, which is told apart from what follows the parameters
        for term in (one(x).double() + other(x.double()) - (3 * x).sin(), one(2 * x) - 0.5):
            loss = loss + term.square().mean()
        return loss

    optimizer = make([*one.parameters(), *other.parameters()])
    for _ in range(8):
        value = optimizer.step(closure)
    assert value < 0.501


def test_the_coarsest_dtype_is_told():
    model, x = network(F64), torch.linspace(0, 1, 5, dtype=F64)[:, None]
    eps = lambda loss, net: ResidualJacobian(loss, net).eps
    assert eps(lambda: model(x).square().mean(), model) == torch.finfo(F64).eps
    assert eps(lambda: model(x).float().square().mean().double(), model) == torch.finfo(F32).eps
    floats = network(F32)
    assert eps(lambda: (floats(x.float()) - x).square().mean(), floats) == torch.finfo(F32).eps
