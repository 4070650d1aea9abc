"""Second derivatives of normalisations by two backward passes, whose gradient is wrong in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import imstep
from imstep import pde
from imstep.complexstep import UnsupportedOperatorError
from imstep.curvature import ResidualJacobian

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(6),
    "layer_norm without parameters": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "batch_norm": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "batch_norm of channels": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten()),
}
POINTS = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(norm: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 6), norm, nn.Tanh(), nn.Linear(6, 1)).double()


def slope(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def twice(net: nn.Module) -> Tensor:
    x = POINTS.clone().requires_grad_()
    return slope(slope(net(x), x)[:, 0], x)[:, 0]


def reverse_over_reverse(net: nn.Module) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda p: net(p)[0])))(POINTS)[:, 0, 0]


def forward_over_reverse(net: nn.Module) -> Tensor:
    return torch.func.vmap(torch.func.hessian(lambda p: net(p)[0]))(POINTS)[:, 0, 0]


def forward(net: nn.Module) -> Tensor:
    return torch.func.jvp(net, (POINTS,), (torch.ones_like(POINTS),))[1]


def dual(net: nn.Module) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(POINTS, torch.ones_like(POINTS))
        return torch.autograd.forward_ad.unpack_dual(net(x)).tangent


def by_jets(net: nn.Module) -> Tensor:
    second = pde.expand(net, POINTS, second=[0]).second
    assert second is not None
    return second[:, 0, 0]


@pytest.mark.parametrize("name", NORMS)
def test_refused(name: str) -> None:
    net = network(NORMS[name]())
    with pytest.raises(UnsupportedOperatorError, match=f"{name.split()[0]} .*two backward passes"):
        ResidualJacobian(lambda: twice(net).square().mean(), net)


@pytest.mark.parametrize("second", [reverse_over_reverse, forward_over_reverse])
def test_refused_within_transforms(second: Callable[[nn.Module], Tensor]) -> None:
    net = network(nn.LayerNorm(6))
    with pytest.raises(UnsupportedOperatorError, match=r"layer_norm .*(two backward passes|forward mode)"):
        ResidualJacobian(lambda: second(net).square().mean(), net)


@pytest.mark.parametrize("second", [twice, reverse_over_reverse, forward_over_reverse])
def test_other_derivatives_of_a_loss_are_refused(second: Callable[[nn.Module], Tensor]) -> None:
    net = network(nn.LayerNorm(6))
    loss = lambda: second(net).square().mean()
    with pytest.raises(UnsupportedOperatorError, match=r"layer_norm .*(two backward passes|forward mode)"):
        imstep.NewtonKrylov(net.parameters()).step(loss)
    with pytest.raises(UnsupportedOperatorError, match=r"layer_norm .*(two backward passes|forward mode)"):
        imstep.Hessian(loss, net) @ torch.ones(37, dtype=torch.float64)


def test_jvp_of_second_derivatives_is_right() -> None:
    """It takes no gradient."""
    weight, bias = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    x = POINTS.clone().requires_grad_()

    def second(w: Tensor) -> Tensor:
        values = torch.tanh(nn.functional.layer_norm(x @ w.T + bias, (6,)))
        return slope(slope(values, x)[:, 0], x)[:, 0]

    direction, h = torch.randn_like(weight), 1e-6
    expected = (second(weight + h * direction) - second(weight - h * direction)) / (2 * h)
    assert torch.allclose(imstep.jvp(second, (weight,), (direction,))[1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [forward, dual])
@pytest.mark.parametrize("name", NORMS)
def test_forward_mode_is_refused(name: str, first: Callable[[nn.Module], Tensor]) -> None:
    net = network(NORMS[name]())
    with pytest.raises(UnsupportedOperatorError, match=r"_norm .*forward mode"):
        ResidualJacobian(lambda: first(net).square().mean(), net)


def test_the_way_out_is_right() -> None:
    net = network(nn.LayerNorm(6))
    J = ResidualJacobian(lambda: by_jets(net).square().sum() / 2, net)
    gradient, step, weight = J.T @ J.residuals, 1e-6, next(net.parameters()).data.view(-1)
    for at in range(0, len(weight), 5):
        losses = []
        for sign in (1, -1):
            weight[at] += sign * step
            losses.append(twice(net).detach().square().sum() / 2)
            weight[at] -= sign * step
        assert abs(gradient[at] - (losses[0] - losses[1]) / (2 * step)) < 1e-6 * (1 + abs(gradient[at]))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6).eval(), nn.GroupNorm(2, 6), nn.RMSNorm(6)])
def test_those_that_are_right_are_taken(norm: nn.Module) -> None:
    net = network(norm)
    J = ResidualJacobian(lambda: twice(net).square().sum() / 2, net)
    assert J.residuals.sub(twice(net)).abs().max() < 1e-12


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6).eval(), nn.GroupNorm(2, 6), nn.RMSNorm(6)])
def test_forward_mode_of_those_is_taken(norm: nn.Module) -> None:
    net = network(norm)
    J = ResidualJacobian(lambda: forward(net).square().sum() / 2, net)
    assert J.residuals.sub(forward(net)[:, 0]).abs().max() < 1e-12


def test_a_norm_beside_forward_mode_is_taken() -> None:
    """Of what has no tangent, though it is called within the function that is differentiated."""
    net = nn.ModuleList([network(nn.LayerNorm(6)), network(nn.RMSNorm(6))])
    product = lambda x: net[0](POINTS) * net[1](x)
    values = lambda: torch.func.jvp(product, (POINTS,), (torch.ones_like(POINTS),))[1]
    J = ResidualJacobian(lambda: values().square().sum() / 2, net)
    assert J.residuals.sub(values()[:, 0]).abs().max() < 1e-12


def test_first_derivatives_are_taken() -> None:
    net = network(nn.LayerNorm(6))
    x = POINTS.clone().requires_grad_()
    J = ResidualJacobian(lambda: slope(net(x), x)[:, 0].square().sum() / 2, net)
    assert J.residuals.sub(slope(net(x), x)[:, 0]).abs().max() < 1e-12
