"""Linear operators: matrices that are known by their products only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import scipy.sparse.linalg


class LinearOperator(ABC):
    """A matrix A of shape (m, n) that is known by its products A v.

    An operator is square and self-adjoint unless its documentation says otherwise; one that is not overrides
    `rmatvec`. A subclass passes its size to this constructor and gives `matvec`; also `matmat` and `rmatmat` where a
    block of products is cheaper than its columns one by one.

    Args:
        size: the number n of rows and of columns; for a rectangular matrix (m, n).
        dtype: of the vectors.
        device: of the vectors.

    Attributes:
        shape: (m, n).

    Example:
        >>> from imstep.linalg import DenseOperator, IdentityOperator
        >>> A = DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> A @ torch.tensor([1.0, 0.0])
        tensor([2., 1.])
        >>> (A + 10 * IdentityOperator.like(A)) @ torch.tensor([1.0, 0.0])
        tensor([12.,  1.])

    Source: the interface follows scipy.sparse.linalg.LinearOperator.
    """

    def __init__(self, size: int | tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.shape = (size, size) if isinstance(size, int) else size
        if min(self.shape) < 0:
            raise ValueError(f"the size of an operator is at least 0, got {size}.")
        self.dtype = dtype
        self.device = torch.device(device)

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """A v for one vector (n,); callers use `A @ v`, which checks v first."""

    def matmat(self, block: Tensor) -> Tensor:
        """A V for a block (n, k), (m, k); by default column after column, k products."""
        return self._by_columns(self.matvec, block, self.shape[0])

    def rmatvec(self, vector: Tensor) -> Tensor:
        """Aᵀ u for one vector (m,); a self-adjoint operator inherits this."""
        return self.matvec(vector)

    def rmatmat(self, block: Tensor) -> Tensor:
        """Aᵀ U for a block (m, k), (n, k); by default column after column, k products."""
        return self._by_columns(self.rmatvec, block, self.shape[1])

    def _by_columns(self, product: Callable[[Tensor], Tensor], block: Tensor, rows: int) -> Tensor:
        columns = [product(column) for column in block.unbind(1)]
        return torch.stack(columns, dim=1) if columns else block.new_empty(rows, 0)

    @property
    def size(self) -> int:
        """The number n of rows and of columns.

        Raises:
            ValueError: the operator is rectangular.
        """
        rows, columns = self.shape
        if rows != columns:
            raise ValueError(
                f"this needs a square operator, and one of shape ({rows}, {columns}) has no size. Use A.shape; "
                "solvers work on square operators such as a Gauss-Newton matrix."
            )
        return rows

    @property
    def T(self) -> LinearOperator:
        """The transpose Aᵀ, an operator of shape (n, m)."""
        return TransposedOperator(self)

    def __matmul__(self, other: Tensor) -> Tensor:
        """A v or A V.

        Args:
            other: vector (n,) or block of columns (n, k), of the operator's dtype and device.

        Returns:
            (m,) or (m, k).

        Raises:
            TypeError: `other` is not a tensor or has another dtype.
            ValueError: `other` has another shape or lies on another device.
        """
        check_vectors(self, other)
        with torch._C._DisableAutocast():  # it would round products to half precision
            return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return SumOperator(self, other)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return SumOperator(self, ScaledOperator(-1.0, other))

    def __mul__(self, factor: float) -> LinearOperator:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return ScaledOperator(float(factor), self)

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return ScaledOperator(-1.0, self)

    def to_dense(self, *, limit: int = 4096) -> Tensor:
        """The matrix itself, (m, n): min(m, n) products. For tests and small problems.

        Raises:
            ValueError: it has more entries than `limit` squared.
        """
        rows, columns = self.shape
        if rows * columns > limit**2:
            raise ValueError(
                f"to_dense of an operator of shape ({rows}, {columns}) would need {min(rows, columns)} products and "
                f"{rows * columns} numbers; the limit is {limit} squared. "
                f"Use products (A @ v), or pass limit={math.isqrt(rows * columns - 1) + 1}."
            )
        identity = torch.eye(min(rows, columns), dtype=self.dtype, device=self.device)
        return (self.T @ identity).mT if rows < columns else self @ identity

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator for `scipy.sparse.linalg` (NumPy vectors, any device; needs SciPy).

        Raises:
            ImportError: SciPy is not installed.
        """
        from imstep.linalg.scipy_bridge import to_scipy

        return to_scipy(self)


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


def check_vectors(operator: LinearOperator, vectors: Tensor) -> None:
    """Raise unless `vectors`, (n,) or (n, k), can be multiplied by the operator as they are."""
    if not isinstance(vectors, Tensor):
        raise TypeError(
            f"an operator multiplies torch tensors, not {type(vectors).__name__}. "
            "Convert with torch.as_tensor."
        )
    m, n = operator.shape
    if vectors.ndim not in (1, 2) or vectors.shape[0] != n:
        raise ValueError(
            f"an operator of shape ({m}, {n}) multiplies vectors of shape ({n},) or blocks of shape ({n}, k), "
            f"not {tuple(vectors.shape)}. Flatten or transpose the vectors first."
        )
    if vectors.dtype != operator.dtype:
        raise TypeError(
            f"the operator works in {operator.dtype}, the vector is {vectors.dtype}. "
            f"Convert it with v.to({operator.dtype})."
        )
    if vectors.device != operator.device:
        raise ValueError(
            f"the operator lives on {operator.device}, the vector on {vectors.device}. "
            f"Move it with v.to({str(operator.device)!r})."
        )


def check_alike(first: LinearOperator, second: LinearOperator) -> None:
    """Raise unless the two operators multiply the same vectors."""
    mine, other = ((a.shape, a.dtype, a.device) for a in (first, second))
    if mine != other:
        raise ValueError(
            f"operators that are combined must agree in size, dtype and device, got {mine} and {other}. "
            "Build both for the same vectors."
        )
