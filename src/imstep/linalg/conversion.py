"""Matrices of all kinds as operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from imstep.linalg.explicit import DenseOperator
from imstep.linalg.fitting import check_real
from imstep.linalg.operator import LinearOperator


def as_operator(matrix: Any) -> LinearOperator:
    """A matrix as an operator: what solvers and :mod:`imstep.spectral` work on.

    Args:
        matrix: an operator, returned as it is; a tensor or NumPy array (m, n); a sparse matrix or a ``LinearOperator``
            of SciPy, or what multiplies arrays as these do: it has a ``shape``, a ``dtype``, ``@`` and ``.T``.

    Returns:
        An operator of the matrix' dtype; of whole numbers and truth values float64.

    Raises:
        TypeError: it is nothing of these, or complex.
        ValueError: it has not two dimensions.

    Cost: no copy of a tensor, nor of an array whose rows lie one after the other.

    Example:
        >>> as_operator(np.diag([1, 2])) @ torch.ones(2, dtype=torch.float64)
        tensor([1., 2.], dtype=torch.float64)
    """
    if isinstance(matrix, LinearOperator):
        return matrix
    if isinstance(matrix, np.ndarray):
        matrix = torch.from_numpy(known_to_torch(matrix))
    if isinstance(matrix, Tensor):
        return DenseOperator(_real(matrix.detach()))
    if not all(hasattr(matrix, name) for name in ("shape", "dtype", "T", "__matmul__")):
        raise TypeError(
            f"a matrix is an operator of imstep, a tensor, a NumPy array or an operator of SciPy, not a "
            f"{type(matrix).__name__}. For a function of vectors write a subclass of imstep.linalg.LinearOperator; "
            "make lists a tensor by torch.tensor."
        )
    return ArrayOperator(matrix)


def _real(matrix: Tensor) -> Tensor:
    if matrix.is_complex():
        check_real(matrix.dtype)
    return matrix if matrix.is_floating_point() else matrix.double()


def known_to_torch(array: np.ndarray) -> np.ndarray:
    """An array of numbers as the machine has them: files may hold others, such as FITS the bytes from the other end."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


class ArrayOperator(LinearOperator):
    """A matrix that multiplies NumPy arrays, such as a sparse matrix or an operator of SciPy; see :func:`as_operator`.

    Vectors are converted to arrays and back at each product.
    """

    def __init__(self, matrix: Any) -> None:
        if len(matrix.shape) != 2:
            raise ValueError(f"a matrix has two dimensions, got shape {tuple(matrix.shape)}.")
        sample = _real(torch.from_numpy(np.empty(0, dtype=matrix.dtype if matrix.dtype is not None else float)))
        super().__init__((int(matrix.shape[0]), int(matrix.shape[1])), sample.dtype, "cpu")
        self._matrix = matrix

    def matvec(self, vector: Tensor) -> Tensor:
        return self._tensor(self._matrix @ vector.numpy())

    def matmat(self, block: Tensor) -> Tensor:
        return self._tensor(self._matrix @ block.numpy())

    def rmatvec(self, vector: Tensor) -> Tensor:
        return self._tensor(self._matrix.T @ vector.numpy())

    def rmatmat(self, block: Tensor) -> Tensor:
        return self._tensor(self._matrix.T @ block.numpy())

    def _tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), dtype=self.dtype)
