"""The way to SciPy's iterative solvers; SciPy is imported on first use only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import scipy.sparse.linalg


def scipy_operator(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    product: Callable[[Tensor], Tensor],
    transposed: Callable[[Tensor], Tensor],
) -> scipy.sparse.linalg.LinearOperator:
    """A `scipy.sparse.linalg.LinearOperator` over NumPy vectors.

    Vectors are converted to the dtype and device, and back, at each product.

    Args:
        shape, dtype, device: of the operator.
        product, transposed: map a vector or a block to its product with the matrix, with the transpose.

    Raises:
        ImportError: SciPy is not installed.
        TypeError: NumPy has no such dtype (bfloat16).
    """
    try:
        from scipy.sparse.linalg import LinearOperator as ScipyOperator
    except ImportError as error:
        raise ImportError("to_scipy needs SciPy, which is not installed. Run: pip install scipy") from error

    def on_arrays(of: Callable[[Tensor], Tensor], array: np.ndarray) -> np.ndarray:
        tensor = torch.as_tensor(np.ascontiguousarray(array), dtype=dtype, device=device)
        return of(tensor).detach().cpu().numpy()

    return ScipyOperator(
        shape,
        matvec=lambda v: on_arrays(product, v.reshape(-1)),
        rmatvec=lambda v: on_arrays(transposed, v.reshape(-1)),
        matmat=lambda V: on_arrays(product, V),
        rmatmat=lambda V: on_arrays(transposed, V),
        dtype=torch.empty(0, dtype=dtype).numpy().dtype,
    )
