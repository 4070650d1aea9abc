"""Operators made of others: products, and sub-matrices by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.linalg.operator import LinearOperator


class ProductOperator(LinearOperator):
    """A B; what `A @ B` builds. It need not be symmetric where both are.

    Raises:
        ValueError: A has another number of columns than B has rows, or they live on different devices.
        TypeError: they differ in dtype.

    Example:
        >>> from imstep.linalg import DenseOperator, DiagonalOperator
        >>> A = DenseOperator(torch.tensor([[1.0, 2.0], [2.0, 0.0]])) @ DiagonalOperator(torch.tensor([3.0, 1.0]))
        >>> A.to_dense()
        tensor([[3., 2.],
                [6., 0.]])
    """

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        (rows, inner), (others, columns) = first.shape, second.shape
        if inner != others or first.device != second.device:
            raise ValueError(
                f"an operator of shape ({rows}, {inner}) on {first.device} cannot be multiplied by one of shape "
                f"({others}, {columns}) on {second.device}: columns of the first must be rows of the second. "
                "Transpose one of them (A.T), or build both on one device."
            )
        if first.dtype != second.dtype:
            raise TypeError(
                f"the first operator works in {first.dtype}, the second in {second.dtype}. Build both in one dtype."
            )
        super().__init__((rows, columns), first.dtype, first.device)
        self.first, self.second = first, second

    def matvec(self, vector: Tensor) -> Tensor:
        return self.first.matvec(self.second.matvec(vector))

    def matmat(self, block: Tensor) -> Tensor:
        return self.first.matmat(self.second.matmat(block))

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self.second.rmatvec(self.first.rmatvec(vector))

    def rmatmat(self, block: Tensor) -> Tensor:
        return self.second.rmatmat(self.first.rmatmat(block))


class SubmatrixOperator(LinearOperator):
    """``A[rows][:, columns]``; what `A.submatrix(rows, columns)` builds.

    Raises:
        IndexError: an index is out of range.
    """

    def __init__(
        self,
        operator: LinearOperator,
        rows: Tensor | Sequence[int] | slice,
        columns: Tensor | Sequence[int] | slice,
    ) -> None:
        m, n = operator.shape
        self._rows, self._columns = _places(rows, m, operator.device), _places(columns, n, operator.device)
        super().__init__((len(self._rows), len(self._columns)), operator.dtype, operator.device)
        self.operator = operator

    def matvec(self, vector: Tensor) -> Tensor:
        spread = vector.new_zeros(self.operator.shape[1]).index_add_(0, self._columns, vector)
        return self.operator.matvec(spread)[self._rows]

    def matmat(self, block: Tensor) -> Tensor:
        spread = block.new_zeros(block.shape[1], self.operator.shape[1]).index_add_(1, self._columns, block.mT)
        return self.operator.matmat(spread.mT)[self._rows]

    def rmatvec(self, vector: Tensor) -> Tensor:
        spread = vector.new_zeros(self.operator.shape[0]).index_add_(0, self._rows, vector)
        return self.operator.rmatvec(spread)[self._columns]

    def rmatmat(self, block: Tensor) -> Tensor:
        spread = block.new_zeros(block.shape[1], self.operator.shape[0]).index_add_(1, self._rows, block.mT)
        return self.operator.rmatmat(spread.mT)[self._columns]


def _places(index: Tensor | Sequence[int] | slice, size: int, device: torch.device) -> Tensor:
    """What an index stands for among `size` entries, (k,)."""
    places = torch.arange(size, device=device)
    if isinstance(index, slice):
        return places[index]
    index = torch.as_tensor(index, device=device)
    if index.numel() == 0:
        return places[:0]
    if index.ndim != 1 or index.is_floating_point():
        raise IndexError(
            f"an index is one-dimensional, of whole numbers or a mask, got shape {tuple(index.shape)} of "
            f"{index.dtype}. Pass for example torch.tensor([0, 2]), mask.nonzero()[:, 0] or slice(0, 10)."
        )
    return places[index]
