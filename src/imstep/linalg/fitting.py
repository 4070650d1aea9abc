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
