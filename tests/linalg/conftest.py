"""Matrices with planted spectra; the tests' own, independent of imstep."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))


def _with_spectrum(values: Tensor | list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    values = torch.as_tensor(values, dtype=torch.float64)
    n = values.numel()
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    matrix = (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2, vectors


def _normal(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="session")
def with_spectrum() -> Callable[..., tuple[Tensor, Tensor]]:
    """(eigenvalues, seed) -> symmetric float64 matrix (n, n) and its eigenvectors as columns."""
    return _with_spectrum


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """(n, seed) -> normal random float64 vector (n,)."""
    return _normal
