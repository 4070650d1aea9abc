"""The gradient's variance from two halves of a batch, against the gradients of single examples by torch.func."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep.curvature import FrozenClosure, ParameterVector
from imstep.curvature.variance import gradient_variance

F64 = torch.float64
N = 6
X, Y = torch.randn(2, N, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 3
LOSSES = {
    "mse": lambda z, x, y, label: F.mse_loss(z[1], y),
    "squares": lambda z, x, y, label: ((z[1] - y) ** 2).mean(),
    "cross entropy": lambda z, x, y, label: F.cross_entropy(z[1], label),
    "Poisson, with a linear term": lambda z, x, y, label: F.poisson_nll_loss(z[1], y.abs()),
    "one output twice": lambda z, x, y, label: F.mse_loss(z[1], y) + (z[1] ** 2).mean(),
    "an output of another one": lambda z, x, y, label: F.mse_loss(z[0], y) + F.mse_loss(z[1], y),
    "targets that depend": lambda z, x, y, label: F.mse_loss(z[1], 2 * z[0]),
}


class TwoEnds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(3, 3, dtype=F64), nn.Linear(3, 3, dtype=F64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.first(x).tanh()
        return z, self.second(z)


def measured(model: nn.Module, loss, at: Tensor) -> float:
    parameters = ParameterVector(model)
    closure = lambda: loss(model(X[at]), X[at], Y[at], LABELS[at])
    return gradient_variance(FrozenClosure(closure, parameters).linearise(keep_graph=True), parameters)


def by_example(model: nn.Module, loss) -> Tensor:
    """The gradient of each example, (N, n)."""
    parameters = dict(model.named_parameters())

    def of_one(p, x, y, label):
        x, y, label = x[None], y[None], label[None]
        return loss(torch.func.functional_call(model, p, (x,)), x, y, label)

    rows = torch.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0, 0))(parameters, X, Y, LABELS)
    return torch.cat([rows[name].flatten(1) for name in parameters], dim=1).detach()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("count", [N, N - 1], ids=["even", "odd"])
def test_the_difference_of_halves_is_that_of_the_examples_gradients(name: str, count: int) -> None:
    model = TwoEnds()
    rows = by_example(model, LOSSES[name])[:count]
    a, b = -(-count // 2), count // 2
    expected = a * b / count**2 * (rows[0::2].mean(0) - rows[1::2].mean(0)).square().sum()
    assert measured(model, LOSSES[name], torch.arange(count)) == pytest.approx(float(expected), rel=1e-10)


def test_over_all_halves_the_mean_is_the_variance_of_a_mean_of_examples() -> None:
    model, loss = TwoEnds(), LOSSES["cross entropy"]
    found = []
    for half in itertools.combinations(range(N), N // 2):
        order = torch.empty(N, dtype=torch.long)
        order[0::2], order[1::2] = torch.tensor(half), torch.tensor(sorted({*range(N)} - {*half}))
        found.append(measured(model, loss, order))
    expected = by_example(model, loss).var(dim=0).sum() / N
    assert sum(found) / len(found) == pytest.approx(float(expected), rel=1e-10)
    assert max(found) > 1.2 * min(found)


@pytest.mark.parametrize("values", [0, 0.3])
def test_weight_decay_is_without_variance_and_a_single_example_tells_none(values: float) -> None:
    model, plain = TwoEnds(), LOSSES["mse"]
    decay = lambda *batch: plain(*batch) + sum(((p - values) ** 2).sum() for p in model.parameters())
    at = torch.arange(N)
    assert measured(model, decay, at) == pytest.approx(measured(model, plain, at), rel=1e-12)
    assert math.isnan(measured(model, plain, at[:1]))


def test_a_loss_without_examples_is_refused() -> None:
    w = nn.Parameter(torch.ones(2, dtype=F64))
    parameters = ParameterVector([w])
    point = FrozenClosure(lambda: w.prod().exp(), parameters).linearise(keep_graph=True)
    with pytest.raises(ValueError, match="variance_every=0"):
        gradient_variance(point, parameters)
