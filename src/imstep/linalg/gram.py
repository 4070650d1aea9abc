"""Matrices by rows, and their Gram matrices: positive semidefinite, known by their diagonal and columns."""

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


class RowMatrix(LinearOperator):
    """A matrix J of N rows, (N, n), that also tells its rows and its Gram matrix; float64."""

    @abstractmethod
    def rows(self, index: Tensor) -> LinearOperator:
        """The rows at ``index`` (k,)."""

    @abstractmethod
    def gram(self) -> GramMatrix:
        """J Jᵀ, (N, N)."""

    @abstractmethod
    def squared_norm(self) -> float:
        """‖J‖², the trace of J Jᵀ."""

    @abstractmethod
    def written_out(self) -> Tensor:
        """J itself, (N, n); not to be written to."""


class DenseRows(RowMatrix):
    """A matrix that is stored, (N, n), float64."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device)
        self._matrix = matrix

    def matvec(self, vector: Tensor) -> Tensor:
        return self._matrix @ vector

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self._matrix.mT @ vector

    def rows(self, index: Tensor) -> DenseRows:
        return DenseRows(self._matrix[index])

    def gram(self) -> DenseGram:
        return DenseGram(self._matrix @ self._matrix.mT)

    def squared_norm(self) -> float:
        return float(self._matrix.square().sum())

    def written_out(self) -> Tensor:
        return self._matrix
