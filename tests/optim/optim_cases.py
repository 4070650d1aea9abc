"""What several tests of optimizers work on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, LABELS = normal(30, 4), torch.arange(30) % 3


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)


def rosenbrock(w: Tensor) -> Tensor:
    return (100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).sum()


def fitted_order(norms: list[float]) -> float:
    """p of ‖g'‖ ~ C ‖g‖^p, least squares on logarithms over the last steps above rounding."""
    usable = [g for g in norms if g > 1e-15 * max(norms[0], 1)]
    logs = [math.log(g) for g in usable[-4:]]
    x, y = torch.tensor(logs[:-1], dtype=F64), torch.tensor(logs[1:], dtype=F64)
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))
