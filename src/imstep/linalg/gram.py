"""Gram matrices: positive semidefinite, known by their diagonal and columns."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from imstep.linalg.operator import LinearOperator


class GramMatrix(LinearOperator):
    """A symmetric positive semidefinite matrix K, (N, N), that also tells its diagonal and its entries; float64."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of K, (N,)."""

    @abstractmethod
    def entries(self, rows: slice | Tensor, columns: Tensor) -> Tensor:
        """K[rows, columns], (m, k), a tensor of its own."""

    def columns(self, index: Tensor) -> Tensor:
        """K[:, index], (N, k)."""
        return self.entries(slice(None), index)

    @abstractmethod
    def dense(self) -> Tensor:
        """K itself, (N, N); not to be written to."""


class DenseGram(GramMatrix):
    """A symmetric positive semidefinite matrix that is stored, (N, N), as float64."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), torch.float64, matrix.device)
        self._matrix = matrix.double()

    def matvec(self, vector: Tensor) -> Tensor:
        return self._matrix @ vector

    def matmat(self, block: Tensor) -> Tensor:
        return self._matrix @ block

    def diagonal(self) -> Tensor:
        return self._matrix.diagonal()

    def entries(self, rows: slice | Tensor, columns: Tensor) -> Tensor:
        return self._matrix[rows][:, columns]

    def dense(self) -> Tensor:
        return self._matrix
