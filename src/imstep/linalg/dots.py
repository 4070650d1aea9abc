"""Inner products of vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def dots(*pairs: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """Inner products of pairs of vectors (n,), with one synchronisation of the device for all of them."""
    return tuple(torch.stack([torch.dot(a, b) for a, b in pairs]).tolist())
