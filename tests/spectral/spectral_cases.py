"""Matrices with planted spectra, and operators that count; independent of imstep's own numerics."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.linalg.linalg_cases import Counted as CountedProducts

F64 = torch.float64


def planted(values: Tensor | list[float], seed: int = 0) -> Tensor:
    """A symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=F64)
    n = len(values)
    vectors = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=F64))[0]
    matrix = (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counted(CountedProducts):
    """Which counts products with its transpose, too."""

    def rmatmat(self, block: Tensor) -> Tensor:
        self.products += block.shape[1]
        return self.matrix.mT @ block


SPECTRA: dict[str, Tensor] = {
    "falling fast": torch.exp(-torch.arange(200, dtype=F64) / 6),
    "falling slowly": 1 / torch.arange(1, 201, dtype=F64),
    "flat": torch.linspace(1, 3, 200, dtype=F64),
    "few": torch.cat([torch.linspace(1, 5, 20, dtype=F64), torch.zeros(180, dtype=F64)]),
    "of both signs": torch.linspace(-1, 2, 200, dtype=F64),
    "a step": torch.cat([torch.full((30,), 4.0, dtype=F64), torch.full((170,), 0.01, dtype=F64)]),
}
