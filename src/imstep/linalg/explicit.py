"""Operators whose matrix is known: dense, diagonal, identity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imstep.linalg.fitting import stored
from imstep.linalg.operator import LinearOperator

if TYPE_CHECKING:
    from imstep.linalg.inverse import DirectSolver
    from imstep.linalg.space import Space


class DenseOperator(LinearOperator):
    """A matrix that is stored, (m, n); symmetric where it is to be solved with.

    Products have derivatives by the vector alone: the matrix is a constant.

    Raises:
        TypeError: the matrix is no tensor of real floating-point numbers.
        ValueError: it has not two dimensions.

    Example:
        >>> DenseOperator(torch.eye(3)).size
        3
    """

    def __init__(self, matrix: Tensor) -> None:
        matrix = stored(matrix, "DenseOperator")
        if matrix.ndim != 2:
            raise ValueError(f"a DenseOperator needs a matrix (m, n), got shape {tuple(matrix.shape)}.")
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device)
        self.matrix = matrix

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def matmat(self, block: Tensor) -> Tensor:
        return self.matrix @ block

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self.matrix.mT @ vector

    def rmatmat(self, block: Tensor) -> Tensor:
        return self.matrix.mT @ block


class DiagonalOperator(LinearOperator):
    """diag(d) for a vector d of shape (n,), a constant.

    Raises:
        TypeError: d is no tensor of real floating-point numbers.
        ValueError: it is not a vector.

    Example:
        >>> DiagonalOperator(torch.tensor([1.0, 4.0])) @ torch.ones(2)
        tensor([1., 4.])
    """

    def __init__(self, diagonal: Tensor) -> None:
        diagonal = stored(diagonal, "DiagonalOperator")
        if diagonal.ndim != 1:
            raise ValueError(f"a DiagonalOperator needs a vector of shape (n,), got {tuple(diagonal.shape)}.")
        super().__init__(diagonal.shape[0], diagonal.dtype, diagonal.device)
        self.diagonal = diagonal

    def matvec(self, vector: Tensor) -> Tensor:
        return self.diagonal * vector

    def matmat(self, block: Tensor) -> Tensor:
        return self.diagonal[:, None] * block

    def direct_solver(self, damping: float, rtol: float | None, max_iterations: int) -> DirectSolver:
        from imstep.linalg.inverse import EntryByEntry

        return EntryByEntry(self.diagonal + damping)


class LowRankOperator(LinearOperator):
    """V diag(θ) Vᵀ with orthonormal columns V, (n, k).

    Args:
        vectors: V.
        values: θ, (k,).
        space: what the entries of vectors stand for.

    Cost: 4 n k operations a product. Its inverse, with a damping, takes no iterations.

    Raises:
        ValueError: there are not as many values as vectors.

    Example:
        >>> A = LowRankOperator(torch.eye(3)[:, :1], torch.tensor([4.0]))
        >>> A.inverse(damping=1.0) @ torch.ones(3)
        tensor([0.2000, 1.0000, 1.0000])
    """

    def __init__(self, vectors: Tensor, values: Tensor, space: Space | None = None) -> None:
        vectors, values = stored(vectors, "LowRankOperator"), stored(values, "LowRankOperator")
        if vectors.ndim != 2 or values.shape != vectors.shape[1:]:
            raise ValueError(
                f"a LowRankOperator takes vectors (n, k) and values (k,), got {tuple(vectors.shape)} and "
                f"{tuple(values.shape)}."
            )
        super().__init__(len(vectors), vectors.dtype, vectors.device)
        self.vectors, self.values, self._space = vectors, values.to(vectors), space

    @property
    def spaces(self) -> tuple[Space | None, Space | None]:
        return self._space, self._space

    def matvec(self, vector: Tensor) -> Tensor:
        return self.vectors @ (self.values * (self.vectors.mT @ vector))

    def matmat(self, block: Tensor) -> Tensor:
        return self.vectors @ (self.values[:, None] * (self.vectors.mT @ block))

    def direct_solver(self, damping: float, rtol: float | None, max_iterations: int) -> DirectSolver:
        from imstep.linalg.inverse import InEigenvectors

        return InEigenvectors(self.vectors, self.values, damping)


class IdentityOperator(LinearOperator):
    """The identity of size n; `IdentityOperator.like(A)` for another operator's size, dtype and device.

    Example:
        >>> IdentityOperator(2) @ torch.ones(2)
        tensor([1., 1.])
    """

    def __init__(
        self, size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(size, dtype, device)

    @classmethod
    def like(cls, operator: LinearOperator) -> IdentityOperator:
        """The identity that can be added to `operator`."""
        return cls(operator.size, dtype=operator.dtype, device=operator.device)

    def matvec(self, vector: Tensor) -> Tensor:
        return vector.clone()

    def matmat(self, block: Tensor) -> Tensor:
        return block.clone()
