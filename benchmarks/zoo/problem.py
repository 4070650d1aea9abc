"""What is judged: a network and a loss; random inputs and losses that all networks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A network and the loss of its parameters and buffers, a scalar that depends on nothing else.

    Attributes:
        single: whether the sides are to be judged in float32, where PyTorch takes another kernel.
    """

    module: nn.Module
    loss: Callable[[], Tensor]
    single: bool = False


def draw(*shape: int, seed: int = 2) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(outputs: Any) -> Tensor:
    """Σ mean tanh(w y) over all floating-point tensors y of a structure, w fixed and random."""
    generator = torch.Generator().manual_seed(5)
    total: Any = 0.0
    for t in _tensors(outputs):
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
        total = total + torch.tanh(weights * t).sum() / math.sqrt(max(t.numel(), 1))
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
