"""A small problem, and what a plain loop does on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

X = torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None]
Y = (4 * X).sin()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def plainly(method: Any, steps: int) -> list[float]:
    """The losses before some steps."""
    model = net()
    optimizer = method(model.parameters())
    return [float(optimizer.step(lambda: F.mse_loss(model(X), Y))) for _ in range(steps)]
