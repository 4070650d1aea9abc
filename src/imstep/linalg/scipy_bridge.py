"""The way to SciPy's iterative solvers; SciPy is imported on first use only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import scipy.sparse.linalg

    from imstep.linalg.operator import LinearOperator


def to_scipy(operator: LinearOperator) -> scipy.sparse.linalg.LinearOperator:
    """The operator as a `scipy.sparse.linalg.LinearOperator` over NumPy vectors.

    Vectors are converted to the operator's dtype and device, and back, at each product.

    Raises:
        ImportError: SciPy is not installed.
        TypeError: NumPy has no such dtype (bfloat16).
    """
    try:
        from scipy.sparse.linalg import LinearOperator as ScipyOperator
    except ImportError as error:
        raise ImportError("to_scipy needs SciPy, which is not installed. Run: pip install scipy") from error

    def to_torch(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), dtype=operator.dtype, device=operator.device)

    def to_numpy(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().cpu().numpy()

    return ScipyOperator(
        operator.shape,
        matvec=lambda v: to_numpy(operator @ to_torch(v.reshape(-1))),
        rmatvec=lambda v: to_numpy(operator.T @ to_torch(v.reshape(-1))),
        matmat=lambda V: to_numpy(operator @ to_torch(V)),
        rmatmat=lambda V: to_numpy(operator.T @ to_torch(V)),
        dtype=torch.empty(0, dtype=operator.dtype).numpy().dtype,
    )
