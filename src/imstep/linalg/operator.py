"""Linear operators: matrices that are known by their products only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from imstep.linalg.fitting import check_real, check_vectors
from imstep.uncompiled import uncompiled

if TYPE_CHECKING:
    import scipy.sparse.linalg

    from imstep.linalg.inverse import DirectSolver, InverseOperator
    from imstep.linalg.parts import TraceParts
    from imstep.linalg.space import Space


@uncompiled
class LinearOperator(ABC):
    """A matrix A of shape (m, n) that is known by its products A v.

    An operator is square and self-adjoint unless its documentation says otherwise; one that is not overrides
    `rmatvec`. A subclass passes its size to this constructor and gives `matvec`; also `matmat` and `rmatmat` where a
    block of products is cheaper than its columns one by one.

    Args:
        size: the number n of rows and of columns; for a rectangular matrix (m, n).
        dtype: of the vectors; real floating point.
        device: of the vectors.

    Raises:
        TypeError: another dtype.

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

    __array_ufunc__ = None  # NumPy leaves products with an operator to the operator

    def __init__(self, size: int | tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.shape = (size, size) if isinstance(size, int) else size
        if min(self.shape) < 0:
            raise ValueError(f"the size of an operator is at least 0, got {size}.")
        check_real(dtype)
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
        # Each product stays in one piece: to interleave large vectors costs as much as to compute with them.
        return torch.stack(columns).mT if columns else block.new_empty(rows, 0)

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
    def spaces(self) -> tuple[Space | None, Space | None]:
        """What the entries of A v and of v stand for, such as the parameters of a model; None where not known."""
        return None, None

    def held(self, vector: Tensor) -> Tensor:
        """A vector (n,), the same in all processes, as solvers are to hold it: sharded where products are."""
        return vector

    @property
    def T(self) -> LinearOperator:
        """The transpose Aᵀ, an operator of shape (n, m)."""
        from imstep.linalg.composed import TransposedOperator

        return TransposedOperator(self)

    def gram(self) -> LinearOperator:
        """A Aᵀ, an operator of shape (m, m)."""
        return self @ self.T

    def __repr__(self) -> str:
        rows, columns = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{type(self).__name__}: {rows:,} x {columns:,}, {dtype} on {self.device}>"

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...

    @overload
    def __matmul__(self, other: Sequence[Tensor]) -> list[Tensor]: ...

    def __matmul__(self, other: Tensor | LinearOperator | Sequence[Tensor]) -> Tensor | LinearOperator | list[Tensor]:
        """A v, A V or A B.

        Args:
            other: vector (n,) or block of columns (n, k), of the operator's dtype and device; or an operator B of
                n rows, for the operator A B; or a list of tensors shaped like the parameters that A belongs to.

        Returns:
            (m,), (m, k), an operator or a list.

        Raises:
            TypeError: `other` is neither a tensor nor an operator, or has another dtype.
            ValueError: `other` has another shape or lies on another device.
        """
        if isinstance(other, LinearOperator):
            from imstep.linalg.composed import ProductOperator

            return ProductOperator(self, other)
        if isinstance(other, (list, tuple)):
            from imstep.linalg.space import known

            rows, columns = (known(space, self) for space in self.spaces)
            return rows.unflatten(self @ columns.flatten(columns.checked(other)))
        check_vectors(self, other)
        assert isinstance(other, Tensor)
        with torch._C._DisableAutocast():  # it would round products to half precision
            return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """x A for a vector (m,), or X A for a block of rows (k, m): products with Aᵀ."""
        if isinstance(other, Tensor) and other.ndim == 2:
            return (self.T @ other.mT).mT
        return self.T @ other

    def __add__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        from imstep.linalg.composed import SumOperator

        return SumOperator(self, other)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return self + -1.0 * other

    def __mul__(self, factor: float | Tensor) -> LinearOperator:
        if not _is_number(factor):
            return NotImplemented
        from imstep.linalg.composed import ScaledOperator

        return ScaledOperator(float(factor), self)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> LinearOperator:
        return self * (1 / float(divisor)) if _is_number(divisor) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return -1.0 * self

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
        from imstep.linalg.scipy_bridge import scipy_operator

        return scipy_operator(self.shape, self.dtype, self.device, self.__matmul__, self.T.__matmul__)

    def submatrix(
        self, rows: Tensor | Sequence[int] | slice, columns: Tensor | Sequence[int] | slice | None = None
    ) -> LinearOperator:
        """The sub-matrix of some rows and columns, by index, as an operator; without `columns` those of `rows`.

        Args:
            rows, columns: whole numbers, a mask or a slice.

        Cost: a product with A each.

        Example:
            >>> from imstep.linalg import DiagonalOperator
            >>> DiagonalOperator(torch.tensor([1.0, 2.0, 3.0])).submatrix([2, 0]) @ torch.ones(2)
            tensor([3., 1.])
        """
        from imstep.linalg.composed import SubmatrixOperator

        return SubmatrixOperator(self, rows, rows if columns is None else columns)

    def as_parameters(self, vector: Tensor) -> list[Tensor]:
        """A vector (n,) as a list of tensors, one for each parameter, in its shape and dtype.

        Raises:
            ValueError: the vector has another shape, or the operator belongs to no model.
        """
        from imstep.linalg.space import known

        if vector.shape != (self.shape[1],):
            raise ValueError(f"the parameters are a vector of shape ({self.shape[1]},), got {tuple(vector.shape)}.")
        return known(self.spaces[1], self).unflatten(vector)

    def as_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`as_parameters`.

        Raises:
            TypeError, ValueError: they are not one tensor for each parameter, of its shape.
        """
        from imstep.linalg.space import known

        columns = known(self.spaces[1], self)
        return columns.flatten(columns.checked(tensors))

    def diagonal_blocks(self, by: str) -> dict[str, LinearOperator]:
        """The blocks on the diagonal that belong to the layers or parameters of a model, by name.

        Args:
            by: "layer" or "parameter".

        Raises:
            ValueError: the operator belongs to no model, or is not square.

        Cost: a product with A each, unless the operator knows a cheaper way.
        """
        from imstep.linalg.space import known

        _ = self.size
        return {name: self.submatrix(own) for name, own in known(self.spaces[1], self).places(by).items()}

    def trace_parts(self) -> TraceParts | None:
        """The trace in parts that can be sampled each by itself, where the operator knows such; else None."""
        return None

    def inverse(
        self,
        damping: float = 0.0,
        preconditioner: LinearOperator | None = None,
        *,
        rtol: float | None = None,
        max_iterations: int | None = None,
    ) -> InverseOperator:
        """(A + λI)⁻¹ as an operator: each product solves a system, and is refused where that did not succeed.

        Args:
            damping: λ >= 0.
            preconditioner: P ≈ (A + λI)⁻¹, symmetric positive definite; for iterative solves.
            rtol: largest ‖b - (A + λI)x‖ / ‖b‖ of a product that is given out, in (0, 1). Default 1e-5; in float32
                that is aimed at, and 1e-3 accepted, in half precision 0.1.
            max_iterations: of an iterative solve; default 10 n, at most 10,000.

        Returns:
            An :class:`~imstep.linalg.InverseOperator`; its `solve` returns solutions with their certificates.

        Example:
            >>> from imstep.linalg import DiagonalOperator
            >>> A = DiagonalOperator(torch.tensor([1.0, -3.0]))
            >>> A.inverse(damping=1.0) @ torch.ones(2)
            tensor([ 0.5000, -0.5000])
        """
        from imstep.linalg.inverse import inverse

        return inverse(self, damping, preconditioner, rtol=rtol, max_iterations=max_iterations)

    def direct_solver(self, damping: float, rtol: float | None, max_iterations: int) -> DirectSolver | None:
        """What `inverse` solves with where the operator's form allows it; None to choose by size."""
        return None


def _is_number(value: object) -> bool:
    """Whether it is a real number of Python's, NumPy's or PyTorch's."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0)
