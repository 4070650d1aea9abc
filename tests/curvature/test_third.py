"""Third derivatives of closures: the same batch as everything else, and no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from imstep.curvature import FrozenClosure, ParameterVector
from imstep.curvature.third import derivatives_along

F64 = torch.float64
X, Y = (torch.randn(8, n, generator=torch.Generator().manual_seed(n), dtype=F64) for n in (4, 3))


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def along(model: nn.Module, loss, direction: Tensor) -> tuple[float, float]:
    """φ''(0) and φ'''(0) of φ(t) = f(w + t d), by three derivatives with respect to the one number t."""
    named = dict(model.named_parameters())
    parts = dict(zip(named, ParameterVector(model).unflatten(direction), strict=True))
    t = torch.zeros((), dtype=F64, requires_grad=True)
    moved = {name: p.detach() + t * parts[name] for name, p in named.items()}
    y = loss(lambda x: functional_call(model, moved, (x,)))
    derivatives = []
    for _ in range(3):
        (y,) = torch.autograd.grad(y, t, create_graph=True)
        derivatives.append(float(y.detach()))
    return derivatives[1], derivatives[2]


@pytest.mark.parametrize("backward", [False, True], ids=["loss", "loss and backward"])
def test_it_is_the_third_derivative_along_the_direction(backward):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)
    parameters = ParameterVector(model)
    direction = torch.randn(parameters.size, dtype=F64)

    def closure():
        loss = F.mse_loss(model(X), Y)
        if backward:
            model.zero_grad()
            loss.backward()
        return loss

    frozen = FrozenClosure(closure, parameters)
    frozen.linearise()
    expected = along(model, lambda net: F.mse_loss(net(X), Y), direction)
    assert derivatives_along(frozen, parameters, direction) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(frozen.gradient()[1], ParameterVector(model).flatten(torch.autograd.grad(
        F.mse_loss(model(X), Y), list(model.parameters())
    )))


def test_random_numbers_and_buffers_are_those_of_the_step():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).to(F64)
    parameters = ParameterVector(model)
    direction = torch.randn(parameters.size, dtype=F64)
    frozen = FrozenClosure(lambda: F.mse_loss(model(X), Y), parameters)
    frozen.linearise()
    start, step = parameters.get(), 2.5e-4

    def curvature(t: float) -> float:
        parameters.move(parameters.snapshot(), direction, t)
        value = float(direction @ frozen.product(direction))
        parameters.move(parameters.snapshot(), direction, -t)
        return value

    differences = [(curvature(h) - curvature(-h)) / (2 * h) for h in (step, 2 * step)]
    second, found = derivatives_along(frozen, parameters, direction)
    assert second == pytest.approx(curvature(0.0), rel=1e-12)
    assert found == pytest.approx((4 * differences[0] - differences[1]) / 3, rel=1e-8)
    torch.testing.assert_close(parameters.get(), start, rtol=1e-14, atol=1e-15)
    frozen.leave(accepted=True)
    assert int(model[1].num_batches_tracked) == 1
