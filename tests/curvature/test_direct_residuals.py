"""Residuals that are entries of parameters, as of penalties on weights, beside autograd row by row."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from imstep import LeastSquares
from imstep.curvature import ResidualJacobian

F64 = torch.float64
POINTS = torch.rand(12, 2, dtype=F64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers, a convolution, weights that are normalised, and coefficients of no other use."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.conv = nn.Linear(2, 8), nn.Conv1d(2, 3, 3)
            self.last = nn.utils.parametrizations.weight_norm(nn.Linear(6, 1))
            self.spare = nn.Parameter(torch.randn(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.conv(torch.sin(self.first(x)).view(-1, 2, 4))).flatten(1))


START = [p.detach().clone() + 0.1 for p in Net().parameters()]
SCALE = torch.rand(sum(p.numel() for p in START), dtype=F64) + 1
PENALTIES: dict[str, Callable[[Net], list[Tensor]]] = {
    "all": lambda net: list(net.parameters()),
    "one": lambda net: [net.first.weight],
    "vector": lambda net: [nn.utils.parameters_to_vector(net.parameters())],
    "some, flat": lambda net: [torch.cat([net.first.weight.view(-1), 2 * net.spare, net.conv.weight.flatten()])],
    "from the start": lambda net: [p - p0 for p, p0 in zip(net.parameters(), START, strict=True)],
    "scaled": lambda net: [-0.3 * (p - 1) / 2 + 1 for p in net.parameters()],
    "to the start": lambda net: [
        f(p, p0)
        for f in (lambda p, c: c - p, lambda p, c: 0.3 - 2 * p, lambda p, c: -torch.add(c, p, alpha=3))
        for p, p0 in zip(net.parameters(), START, strict=True)
    ],
    "weighed": lambda net: [p0.abs().sqrt() * (p - p0) for p, p0 in zip(net.parameters(), START, strict=True)],
    "weighed, flat": lambda net: [
        torch.linspace(1, 2, len(SCALE), dtype=F64) * nn.utils.parameters_to_vector(net.parameters()) / SCALE
    ],
    "weighed by themselves": lambda net: [p * p.detach().square() for p in net.parameters()],
    "weighed by rows": lambda net: [net.first.weight * START[1][:, :1], net.first.weight / START[1][:1]],
    "entries": lambda net: [net.first.weight[:, 0], net.first.weight.T, net.spare.flip(0)],
    "of one layer twice": lambda net: [net.first.weight, net.first.weight - 1, net.first.bias],
    "tied": lambda net: [net.first.weight[:4] - net.first.weight[4:], net.first.bias],
    "outer": lambda net: [net.spare[:, None] + torch.zeros(3, 4, dtype=F64), net.spare + torch.zeros(2, 3, dtype=F64)],
}


def by_rows(terms: list[Tensor], net: nn.Module) -> tuple[Tensor, Tensor]:
    residuals = torch.cat([t.reshape(-1) for t in terms])
    rows = []
    for r in residuals:
        found = torch.autograd.grad(r, list(net.parameters()), retain_graph=True, allow_unused=True)
        pairs = zip(found, net.parameters(), strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]))
    return residuals.detach(), torch.stack(rows)


@pytest.mark.parametrize("name", PENALTIES)
def test_rows(name: str) -> None:
    net = Net()
    terms = lambda: [net(POINTS) - 1, *PENALTIES[name](net)]
    J = ResidualJacobian(lambda: sum(t.square().sum() for t in terms()) / 2, net)
    residuals, rows = by_rows(terms(), net)
    assert torch.allclose(J.residuals, residuals)
    assert torch.allclose(J.to_dense(), rows)
    assert torch.allclose(J.gram().dense(), rows @ rows.T)
    assert torch.allclose(J.gradient, rows.T @ residuals)


@pytest.mark.parametrize("name", [*list(PENALTIES)[:10], "of one layer twice"])
def test_no_pass_for_each_entry(name: str) -> None:
    net = Net()
    loss = lambda: (net(POINTS) - 1).square().mean() + sum(t.square().sum() for t in PENALTIES[name](net))
    J = ResidualJacobian(loss, net)
    assert J.explicit == ()
    assert J.backward_passes < 8


def test_steps_of_a_stack_of_networks_and_a_penalty() -> None:
    stack = nn.ParameterDict({"w": torch.randn(4, 2, 6), "b": torch.randn(4, 1, 6), "v": torch.randn(4, 6, 1)}).double()

    def loss() -> Tensor:
        values = torch.tanh(POINTS @ stack["w"] + stack["b"]) @ stack["v"]
        return (values - 1).square().mean() + 1e-3 * sum(p.square().sum() for p in stack.values())

    assert ResidualJacobian(loss, stack).explicit == ()
    optimizer = LeastSquares(stack.parameters())
    losses = [float(optimizer.step(loss)) for _ in range(12)]
    assert losses[-1] < 0.1 * losses[0]
    assert torch.allclose(loss().detach(), torch.tensor(optimizer.last_step.new_loss, dtype=F64))


def test_a_penalty_alone_and_no_warning() -> None:
    w = nn.Parameter(torch.randn(200, dtype=F64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        J = ResidualJacobian(lambda: (w - 1).square().sum() / 2, [w])
    assert torch.equal(J.to_dense(), torch.eye(200, dtype=F64))
