"""Matrices by rows, and their Gram matrices: positive semidefinite, known by their diagonal and columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from imstep.linalg.operator import LinearOperator
from imstep.linalg.random_maps import sketch

BLOCK = 2**24
"""Entries of rows that are written out at a time: 128 MB."""


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

    def principal(self, index: Tensor) -> Tensor:
        """K[index, index], (k, k), of different indices."""
        return self.entries(index, index)

    @abstractmethod
    def dense(self) -> Tensor:
        """K itself, (N, N); not to be written to."""


class KeptColumns(GramMatrix):
    """A matrix K whose columns, once computed, are kept, and need not be computed again for the whole of it.

    Args:
        matrix: K.

    Example:
        >>> K = KeptColumns(DenseGram(torch.tensor([[2.0, 1.0], [1.0, 3.0]])))
        >>> _ = K.columns(torch.tensor([1]))
        >>> K.dense()
        tensor([[2., 1.],
                [1., 3.]], dtype=torch.float64)
    """

    def __init__(self, matrix: GramMatrix) -> None:
        super().__init__(matrix.size, matrix.dtype, matrix.device)
        self._matrix = matrix
        self._kept: list[tuple[Tensor, Tensor]] = []

    def matvec(self, vector: Tensor) -> Tensor:
        return self._matrix.matvec(vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self._matrix.matmat(block)

    def diagonal(self) -> Tensor:
        return self._matrix.diagonal()

    def entries(self, rows: slice | Tensor, columns: Tensor) -> Tensor:
        return self._matrix.entries(rows, columns)

    def columns(self, index: Tensor) -> Tensor:
        found = self._matrix.columns(index)
        self._kept.append((index, found))
        return found

    def dense(self) -> Tensor:
        if not self._kept:
            return self._matrix.dense()
        rest = torch.ones(self.size, dtype=torch.bool, device=self.device)
        whole = torch.empty(self.size, self.size, dtype=self.dtype, device=self.device)
        for index, found in self._kept:
            rest[index] = False
            whole[:, index] = found
            whole[index] = found.mT
        others = rest.nonzero()[:, 0]
        whole[others[:, None], others] = self._matrix.principal(others)
        return whole.tril_() + whole.tril(-1).mT


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


class RowsGram(GramMatrix):
    """J Jᵀ for rows J that are stored, (N, n), float64; entries are computed when they are asked for."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(len(rows), rows.dtype, rows.device)
        self._rows = rows

    def matvec(self, vector: Tensor) -> Tensor:
        return self._rows @ (self._rows.mT @ vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self._rows @ (self._rows.mT @ block)

    def diagonal(self) -> Tensor:
        return torch.linalg.vector_norm(self._rows, dim=1).square()

    def entries(self, rows: slice | Tensor, columns: Tensor) -> Tensor:
        return self._rows[rows] @ self._rows[columns].mT

    def dense(self) -> Tensor:
        return self._rows @ self._rows.mT


class Rotation(Protocol):
    """A matrix Q, (N, m), with orthonormal columns."""

    def project(self, vector: Tensor) -> Tensor:
        """Qᵀ v, (m,) of (N,)."""

    def lift(self, vector: Tensor) -> Tensor:
        """Q v, (N,) of (m,)."""


class RowMatrix(LinearOperator):
    """A matrix J of N rows, (N, n), that also tells its rows and its Gram matrix; float64."""

    @abstractmethod
    def rows(self, index: Tensor) -> RowMatrix:
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

    def sketched(self, width: int, generator: torch.Generator) -> Tensor:
        """J Ω, (N, width), for a random Ω with E ΩΩᵀ = I."""
        return sketch(self.written_out(), width, generator)

    def normal(self, vector: Tensor) -> Tensor:
        """JᵀJ v, (n,)."""
        return self.rmatvec(self.matvec(vector))

    def in_units(self, units: Tensor) -> RowMatrix:
        """J D⁻¹ for D (n,) > 0."""
        return ScaledRows(self, units)

    def above(self, rows: Tensor) -> RowMatrix:
        """J, written out, above other rows (m, n)."""
        return DenseRows(torch.cat([self.written_out(), rows]))

    def condensed(self) -> tuple[RowMatrix, Rotation | None]:
        """B and Q with J = Q B, where B has fewer rows that are met with less effort; else J itself and None."""
        return self, None

    def packed(self, form: Any) -> Tensor:
        """The rows as they are sent, (N, k); ``form`` is what matrices whose rows are joined have agreed upon."""
        return self.written_out()

    def unpacked(self, packed: Tensor, form: Any) -> RowMatrix:
        """A matrix of this kind from rows as they are sent."""
        return DenseRows(packed)

    def blocks(self, entries: int) -> Iterator[Tensor]:
        """J itself, from above, in blocks of about so many entries, each of at least as many rows as columns."""
        count, size = self.shape
        pieces = max(1, min(count * size // max(entries, 1), count // max(size, 1)))
        if pieces == 1:
            yield self.written_out()
            return
        for index in torch.arange(count, device=self.device).tensor_split(pieces):
            yield self.rows(index).written_out()

    def column_norms(self) -> Tensor:
        """‖J e_i‖, (n,)."""
        squares = [torch.linalg.vector_norm(block, dim=0) for block in self.blocks(BLOCK)]
        return torch.linalg.vector_norm(torch.stack(squares), dim=0)


class ScaledRows(RowMatrix):
    """J D⁻¹ for the rows J and the diagonal D of positive units, (n,); written out only as far as J is."""

    def __init__(self, matrix: RowMatrix, units: Tensor) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device)
        self._matrix, self._units = matrix, units

    def matvec(self, vector: Tensor) -> Tensor:
        return self._matrix.matvec(vector / self._units)

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self._matrix.rmatvec(vector) / self._units

    def rows(self, index: Tensor) -> ScaledRows:
        return ScaledRows(self._matrix.rows(index), self._units)

    def gram(self) -> RowsGram:
        return RowsGram(self.written_out())

    def squared_norm(self) -> float:
        return float((self._matrix.column_norms() / self._units).square().sum())

    def written_out(self) -> Tensor:
        return self._matrix.written_out() / self._units


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

    def gram(self) -> RowsGram:
        return RowsGram(self._matrix)

    def squared_norm(self) -> float:
        return float(self._matrix.square().sum())

    def written_out(self) -> Tensor:
        return self._matrix
