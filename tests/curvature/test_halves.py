"""Curvatures of a batch's halves, told by the product of the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imstep.curvature import FrozenClosure, ParameterVector
from imstep.curvature.halves import HalvedTapeOperator
from imstep.curvature.hessian import gauss_newton_of, hessian_of

F64 = torch.float64
X = torch.randn(9, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
SQUARE = lambda r: (r * r).sum()
LOSSES = {
    "squares": lambda z: ((z - X) ** 2).mean(),
    "products": lambda z: SQUARE(z - X),
    "mse": lambda z: F.mse_loss(z, X),
    "targets that depend": lambda z: F.mse_loss(z, 2 * z.roll(1, 1)),
    "cross entropy": lambda z: F.cross_entropy(z, torch.arange(9) % 3),
    "sum of two": lambda z: (
        F.mse_loss(z[:4], X[:4]) + 3 * F.binary_cross_entropy_with_logits(z[4:, 0], X[4:, 0].sigmoid())
    ),
}


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(F64)


def gauss_newton_curvature(net, loss_of_outputs, v) -> torch.Tensor:
    """vᵀJᵀL''Jv by PyTorch's forward mode and double backward."""
    params = dict(net.named_parameters())
    tangents = dict(zip(params, ParameterVector(net).unflatten(v), strict=True))
    call = lambda p: torch.func.functional_call(net, p, (X,))
    z, dz = torch.func.jvp(call, (params,), (tangents,))
    hessian = torch.autograd.functional.hessian(loss_of_outputs, z.detach())
    return torch.einsum("ij,ijkl,kl", dz, hessian, dz).detach()


def halves_of(name):
    """The loss of the rows with even number, doubled as rows are counted, and of those with odd number."""
    if name == "products":
        return [lambda z, s=s: 9 / len(z[s::2]) * ((z - X)[s::2] ** 2).sum() for s in (0, 1)]
    if name == "sum of two":
        return [
            lambda z, s=s: F.mse_loss(z[s:4:2], X[s:4:2])
            + 3 * F.binary_cross_entropy_with_logits(z[4 + s :: 2, 0], X[4 + s :: 2, 0].sigmoid())
            for s in (0, 1)
        ]
    if name == "cross entropy":
        return [lambda z, s=s: F.cross_entropy(z[s::2], torch.arange(9)[s::2] % 3) for s in (0, 1)]
    if name == "targets that depend":
        return [lambda z, s=s: F.mse_loss(z[s::2], 2 * z.roll(1, 1)[s::2]) for s in (0, 1)]
    return [lambda z, s=s: F.mse_loss(z[s::2], X[s::2]) for s in (0, 1)]


@pytest.mark.parametrize("name", LOSSES)
def test_halves_are_those_of_half_batches(name: str) -> None:
    net, loss = model(), LOSSES[name]
    parameters = ParameterVector(net)
    point = FrozenClosure(lambda: loss(net(X)), parameters).linearise(keep_graph=True)
    operator = HalvedTapeOperator(gauss_newton_of(point, parameters), point)
    for seed in range(3):
        v = torch.randn(parameters.size, dtype=F64, generator=torch.Generator().manual_seed(seed))
        image, first, second = operator.measure(v)
        expected = [gauss_newton_curvature(net, half, v) for half in halves_of(name)]
        whole = gauss_newton_curvature(net, loss, v)
        assert float(v @ image) == pytest.approx(float(whole), rel=1e-10)
        assert first - second == pytest.approx(float(expected[0] - expected[1]), rel=1e-9, abs=1e-12)
        assert (first + second) / 2 == pytest.approx(float(whole), rel=1e-10)
    assert operator.products == 3


def test_the_hessian_has_the_spread_of_its_gauss_newton_part() -> None:
    net = model()
    loss = lambda: F.mse_loss(net(X), X)
    parameters = ParameterVector(net)
    point = FrozenClosure(loss, parameters).linearise(keep_graph=True)
    approximate = HalvedTapeOperator(gauss_newton_of(point, parameters), point)
    exact = HalvedTapeOperator(hessian_of(point, parameters), point)
    v = torch.randn(parameters.size, dtype=F64)
    image, first, second = exact.measure(v)
    _, *spread = approximate.measure(v)
    torch.testing.assert_close(image, hessian_of(point, parameters) @ v, rtol=1e-12, atol=1e-14)
    assert (first + second) / 2 == pytest.approx(float(v @ image), rel=1e-12)
    assert first - second == pytest.approx(spread[0] - spread[1], rel=1e-12)


@pytest.mark.parametrize("values", [0, 0.3])
def test_weight_decay_is_without_noise(values: float) -> None:
    net = nn.Linear(3, 3).to(F64)
    parameters = ParameterVector(net)
    spreads = []
    for decay in (0.0, 10.0):
        penalty = lambda: sum(((p - values) ** 2).sum() for p in net.parameters())
        loss = lambda decay=decay, penalty=penalty: F.mse_loss(net(X), X) + decay * penalty()
        point = FrozenClosure(loss, parameters).linearise(keep_graph=True)
        _, first, second = HalvedTapeOperator(gauss_newton_of(point, parameters), point).measure(
            torch.ones(parameters.size, dtype=F64)
        )
        spreads.append(first - second)
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-10)


def test_a_loss_without_examples_is_refused() -> None:
    w = nn.Parameter(torch.ones(2, dtype=F64))
    parameters = ParameterVector([w])
    point = FrozenClosure(lambda: w.prod().exp(), parameters).linearise(keep_graph=True)
    with pytest.raises(ValueError, match="noise test"):
        HalvedTapeOperator(hessian_of(point, parameters), point)
