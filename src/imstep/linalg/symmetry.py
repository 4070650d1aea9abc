"""Noticing that a matrix is not symmetric."""

from __future__ import annotations

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype) -> float:
    """How much vᵀ(A w) and wᵀ(A v) may differ, relative to the size of A: by rounding, or as with an inverse.

    Our choice. Residuals tell how good an answer is in any case; this is to notice the wrong question.
    """
    return max(10 * torch.finfo(dtype).eps ** 0.5, 1e-4)


def asymmetric(difference: float) -> ValueError:
    """What to raise where vᵀ(A w) and wᵀ(A v) differ by more than rounding, relative to the size of A."""
    return ValueError(
        f"the operator is not symmetric, or not the same from product to product: vᵀ(A w) and wᵀ(A v) differ by "
        f"{difference:.1e} of its size. Eigenpairs, densities and inverses are those of symmetric matrices: take the "
        "symmetric part 0.5 * (A + A.T), or A.T @ A; make random numbers the same in each product."
    )


def symmetric_part(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(M + Mᵀ) / 2 of a stored matrix that was made by products in ``dtype``.

    Raises:
        ValueError: M is not symmetric to what that dtype resolves.
    """
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    difference = float((matrix - matrix.mT).abs().max()) if matrix.numel() else 0.0
    if difference > tolerance(dtype) * scale:
        raise asymmetric(difference / scale)
    return (matrix + matrix.mT) / 2
