"""How often a step asks for values of tensors: on a GPU each of these waits until the device has caught up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import imstep
from benchmarks.gpu.stream import Reads


def _net(width: int, depth: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), *hidden, nn.Linear(width, 2)).double()
    return net, torch.randn(24, 3).double(), torch.randn(24, 2).double()


def _steps(make, depth: int) -> list[tuple[int, imstep.optim.StepRecord]]:
    """The reads and the record of the second to the fifth step, so that factors are refreshed in some."""
    net, x, y = _net(8, depth)
    optimizer = make(net.parameters())
    closure, found = lambda: (net(x) - y).square().mean(), []
    for _ in range(5):
        with Reads() as reads:
            optimizer.step(closure)
        found.append((reads.count, optimizer.last_step))
    return found[1:]


def test_reads_are_counted_once_and_methods_put_back():
    t, before = torch.ones(2), torch.Tensor.tolist
    with Reads() as reads:
        assert float(t.sum()) == 2
        assert bool(t[0] > 0)
        assert t.tolist() == [1, 1]
        assert t.sum().item() == 2
    assert reads.count == 4
    assert torch.Tensor.tolist is before


@pytest.mark.parametrize("make", [imstep.NewtonKrylov, imstep.NewtonKrylov.for_batches])
@pytest.mark.parametrize("depth", [1, 3])
def test_newton_krylov_reads_three_times_a_product_and_once_a_layer(make, depth):
    steps = _steps(make, depth)
    assert any(record.cost.refreshes for _, record in steps)
    for count, record in steps:
        refreshed = 5 + depth + 2 if record.cost.refreshes else 0
        assert count <= 16 + 3 * record.products + refreshed, (count, record)


@pytest.mark.parametrize("depth", [1, 3])
def test_least_squares_reads_three_times_a_loss_and_three_times_a_layer(depth):
    for count, record in _steps(imstep.LeastSquares, depth):
        assert count <= 24 + 3 * record.cost.losses + 3 * (depth + 2) + 2 * record.products, (count, record)
