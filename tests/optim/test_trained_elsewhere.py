"""Least squares beside tensors that require gradients and that other optimizers train: steps as if detached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from imstep import LeastSquares

F64 = torch.float64
X = torch.linspace(-1, 1, 20, dtype=F64)[:, None]


@dataclass(frozen=True)
class Others:
    """What another optimizer trains; ``seen`` as it is, or detached."""

    weights: Tensor
    spread: Tensor
    net: nn.Module
    seen: Callable[[Tensor], Tensor]


LOSSES: dict[str, Callable[[Tensor, Others], Tensor]] = {
    "weights of points": lambda r, o: (o.seen(o.weights) * r.square()).mean(),
    "by an inner product": lambda r, o: torch.dot(o.seen(o.weights)[:, 0], r.square()[:, 0]),
    "within the square": lambda r, o: (o.seen(o.weights) * r).square().mean(),
    "uncertainty": lambda r, o: r.square().mean() / (2 * o.seen(o.spread) ** 2) + o.seen(o.spread).log(),
    "logarithm of a variance": lambda r, o: (-o.seen(o.spread)).exp() * r.square().mean() + o.seen(o.spread),
    "a zero to begin with": lambda r, o: o.seen(torch.zeros(1, dtype=F64, requires_grad=True)).sum() + r.square().sum(),
    "terms of another network": lambda r, o: r.square().mean() + o.seen(o.net(X)).exp().mean(),
    "product with another network": lambda r, o: (o.seen(o.net(X)) * r).square().mean(),
    "times zeros of another": lambda r, o: r.square().sum() + o.seen(0 * o.weights.sum()),
}


def run(name: str, seen: Callable[[Tensor], Tensor]) -> list[float]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, other = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).to(F64), nn.Linear(1, 1).to(F64)
    weights, spread = torch.ones(20, 1, dtype=F64, requires_grad=True), torch.tensor(1.3, dtype=F64, requires_grad=True)
    others, optimizer = Others(weights, spread, other, seen), LeastSquares(net.parameters())
    losses = []
    for _ in range(4):
        losses.append(float(optimizer.step(lambda: LOSSES[name](net(X) - (3 * X).sin(), others))))
        with torch.no_grad():
            for p in (weights, spread, *other.parameters()):
                p.mul_(1.1).add_(0.1 * torch.linspace(0, 1, p.numel(), dtype=F64).view_as(p))
    return losses


@pytest.mark.parametrize("name", LOSSES)
def test_steps_are_those_with_all_else_detached(name: str) -> None:
    losses = run(name, lambda t: t)
    assert losses == run(name, Tensor.detach)
    assert losses[-1] < losses[0] or name in ("weights of points", "uncertainty", "logarithm of a variance")


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "a linear term": (lambda r, w: (w * r).sum() + r.square().sum(), "at a parameter"),
    "one that is zero now": (lambda r, w: ((w - 1).sum() * r).sum() + r.square().sum(), "at a parameter"),
    "a zero that another makes": (lambda r, w: (w * (r - r).sum()).sum() + r.square().sum(), "at "),
    "a quotient": (lambda r, w: w.sum() * r.square().sum() / (1 + r.square().sum()), "at Div"),
    "one below": (lambda r, w: w.sum() / (1 + r.square().sum()), "at Div"),
    "a negative weight": (lambda r, w: -w.sum() * r.square().sum(), "a factor is negative"),
    "nothing of its own": (lambda r, w: (w - 1).abs().sum(), "none of the parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_of_squares_is_refused(name: str) -> None:
    p, w = nn.Parameter(torch.ones(20, 1, dtype=F64)), torch.ones(20, 1, dtype=F64, requires_grad=True)
    loss, why = REFUSED[name]
    with pytest.raises(ValueError, match=why):
        LeastSquares([p]).step(lambda: loss(p - X, w))
