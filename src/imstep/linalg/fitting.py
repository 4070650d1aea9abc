"""Which vectors and operators fit an operator."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Matrix(Protocol):
    """What is checked of an operator: the form of what it multiplies."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


def check_real(dtype: torch.dtype) -> None:
    """Raise unless vectors of this dtype are of real numbers with fractions."""
    if dtype.is_complex:
        raise TypeError(
            "operators are of real numbers, and this matrix is complex. Take its real part, or the real matrix "
            "[[Re, -Im], [Im, Re]] of twice the size."
        )
    if not dtype.is_floating_point:
        raise TypeError(f"operators are of floating-point numbers, not of {dtype}. Convert the matrix by .double().")


def stored(entries: object, what: str) -> Tensor:
    """Entries of a matrix as an operator keeps them: a tensor that has no graph, as solvers' results have none."""
    if not isinstance(entries, Tensor):
        raise TypeError(
            f"a {what} keeps a tensor, not {type(entries).__name__}. Pass torch.as_tensor of it; matrices of any kind "
            "are taken by imstep.linalg.as_operator(matrix)."
        )
    return entries.detach()


def check_vectors(operator: Matrix, vectors: object) -> None:
    """Raise unless `vectors`, (n,) or (n, k), can be multiplied by the operator as they are."""
    if isinstance(operator, Tensor) or not isinstance(getattr(operator, "dtype", None), torch.dtype):
        raise TypeError(
            f"solvers work on operators of imstep, and this is a {type(operator).__name__}. "
            "Pass imstep.linalg.as_operator(matrix)."
        )
    if not isinstance(vectors, Tensor):
        raise TypeError(
            f"an operator multiplies torch tensors, not {type(vectors).__name__}. "
            "Convert with torch.as_tensor."
        )
    if vectors.layout is not torch.strided:
        raise TypeError(f"an operator multiplies dense tensors, and this one is {vectors.layout}. Pass v.to_dense().")
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


def check_alike(first: Matrix, second: Matrix) -> None:
    """Raise unless the two operators multiply the same vectors."""
    mine, other = ((a.shape, a.dtype, a.device) for a in (first, second))
    if mine != other:
        raise ValueError(
            f"operators that are combined must agree in size, dtype and device, got {mine} and {other}. "
            "Build both for the same vectors."
        )
