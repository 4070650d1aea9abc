"""Operators made of others: sums, multiples, transposes, products, and sub-matrices by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.linalg.fitting import check_alike
from imstep.linalg.operator import LinearOperator
from imstep.linalg.space import Space, known


class SumOperator(LinearOperator):
    """A + B; what `A + B` builds.

    Raises:
        ValueError: the two differ in shape, dtype or device.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> A = DiagonalOperator(torch.tensor([1.0, 2.0]))
        >>> (A + A) @ torch.ones(2)
        tensor([2., 4.])
    """

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        check_alike(first, second)
        super().__init__(first.shape, first.dtype, first.device)
        self.first, self.second = first, second

    def matvec(self, vector: Tensor) -> Tensor:
        return self.first.matvec(vector) + self.second.matvec(vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self.first.matmat(block) + self.second.matmat(block)

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self.first.rmatvec(vector) + self.second.rmatvec(vector)

    def rmatmat(self, block: Tensor) -> Tensor:
        return self.first.rmatmat(block) + self.second.rmatmat(block)

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        (rows, columns), (others, more) = self.first.spaces, self.second.spaces
        return rows or others, columns or more

    def held(self, vector: Tensor) -> Tensor:
        return self.second.held(self.first.held(vector))

    def diagonal_blocks(self, by: str) -> dict[str, LinearOperator]:
        places = known(self.spaces[1], self).places(by)
        # What belongs to no model, a multiple of the identity for instance, takes its layers from the other.
        first, second = (
            {name: part.submatrix(own) for name, own in places.items()}
            if part.spaces[1] is None
            else part.diagonal_blocks(by)
            for part in (self.first, self.second)
        )
        return {name: block + second[name] for name, block in first.items()}


class ScaledOperator(LinearOperator):
    """factor · A; what `factor * A` builds.

    Example:
        >>> from imstep.linalg import IdentityOperator
        >>> (3 * IdentityOperator(2)) @ torch.ones(2)
        tensor([3., 3.])
    """

    def __init__(self, factor: float, operator: LinearOperator) -> None:
        super().__init__(operator.shape, operator.dtype, operator.device)
        self.factor, self.operator = factor, operator

    def matvec(self, vector: Tensor) -> Tensor:
        return self.factor * self.operator.matvec(vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self.factor * self.operator.matmat(block)

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self.factor * self.operator.rmatvec(vector)

    def rmatmat(self, block: Tensor) -> Tensor:
        return self.factor * self.operator.rmatmat(block)

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        return self.operator.spaces

    def held(self, vector: Tensor) -> Tensor:
        return self.operator.held(vector)

    def diagonal_blocks(self, by: str) -> dict[str, LinearOperator]:
        return {name: self.factor * block for name, block in self.operator.diagonal_blocks(by).items()}


class TransposedOperator(LinearOperator):
    """Aᵀ; what `A.T` builds.

    Example:
        >>> from imstep.linalg import DenseOperator
        >>> DenseOperator(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).T @ torch.tensor([1.0, 2.0])
        tensor([0., 1.])
    """

    def __init__(self, operator: LinearOperator) -> None:
        rows, columns = operator.shape
        super().__init__((columns, rows), operator.dtype, operator.device)
        self.operator = operator

    def matvec(self, vector: Tensor) -> Tensor:
        return self.operator.rmatvec(vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self.operator.rmatmat(block)

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self.operator.matvec(vector)

    def rmatmat(self, block: Tensor) -> Tensor:
        return self.operator.matmat(block)

    @property
    def T(self) -> LinearOperator:
        """A itself."""
        return self.operator

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        rows, columns = self.operator.spaces
        return columns, rows


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

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        return self.first.spaces[0], self.second.spaces[1]


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
