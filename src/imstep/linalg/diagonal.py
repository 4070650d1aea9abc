"""The diagonal of a matrix from products, and the preconditioner that a diagonal makes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative
from imstep.linalg.explicit import DiagonalOperator
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision
from imstep.linalg.random_maps import random_signs


@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """An unbiased estimate of diag(A).

    Attributes:
        mean: the estimate, (n,).
        standard_error: of each entry, from the spread of the probes, (n,); nan for a single probe.
        products: products with A that were spent.
    """

    mean: Tensor
    standard_error: Tensor
    products: int


@full_precision
def hutchinson_diagonal(
    operator: LinearOperator, probes: int, *, generator: torch.Generator, block: int = 8
) -> DiagonalEstimate:
    """Estimate the diagonal of A by products with random signs v.

        diag(A) = E[v * A v],   each entry's variance = Σ_{j≠i} aᵢⱼ² per probe

    Exact for a diagonal matrix after one probe; otherwise the error falls with the root of their number.

    Args:
        operator: A, self-adjoint, size n.
        probes: number k >= 1 of products.
        generator: draws the signs, on its own device.
        block: products made together, >= 1; memory for twice as many vectors.

    Returns:
        A `DiagonalEstimate`.

    Raises:
        ValueError: probes or block < 1.

    Cost: k products in blocks; 2 · block + 2 vectors of size n.

    Source: Bekas, Kokiopoulou & Saad, Appl. Numer. Math. 57 (2007), 1214-1229, section 2, with Hutchinson's signs.

    Example:
        >>> A = DiagonalOperator(torch.tensor([1.0, -2.0]))
        >>> hutchinson_diagonal(A, probes=1, generator=torch.Generator().manual_seed(0)).mean
        tensor([ 1., -2.])
    """
    if probes < 1 or block < 1:
        raise ValueError(f"probes and block are at least 1, got {probes} and {block}.")
    total = operator.held(torch.zeros(operator.size, dtype=operator.dtype, device=operator.device))
    squares = total.clone()
    for start in range(0, probes, block):
        shape = (operator.size, min(block, probes - start))
        signs = operator.held(random_signs(shape, total.dtype, generator).mT.to(total)).mT
        samples = signs * operator.matmat(signs)
        total += samples.sum(dim=1)
        squares += (samples**2).sum(dim=1)
    mean = total / probes
    variance = (squares / probes - mean**2).clamp(min=0) / (probes - 1) if probes > 1 else mean * math.nan
    return DiagonalEstimate(mean, variance.sqrt(), probes)


@full_precision
def diagonal_preconditioner(
    diagonal: Tensor, *, damping: float = 0.0, power: float = 1.0, floor: float = 1e-3
) -> DiagonalOperator:
    """P = diag((max(|d|, floor · mean |d|) + λ)^-power), applied to residuals.

    Args:
        diagonal: d, (n,): of A, or anything that tells the scale of its rows.
        damping: λ >= 0.
        power: in (0, 1]; less than 1 where d is uncertain, as Martens' 0.75 for sums of squared gradients.
        floor: least entry relative to the mean, > 0, at most 1: an entry that is small by chance, or negative, must not
            let a direction outweigh all others.

    Returns:
        A `DiagonalOperator`, positive definite for finite d.

    Raises:
        ValueError: a number out of range; d is not a vector.

    Source: Martens, Deep learning via Hessian-free optimization (ICML 2010), section 4.7, for the power; the floor is
    our choice.

    Example:
        >>> diagonal_preconditioner(torch.tensor([4.0, -1.0, 0.0]), power=0.5, floor=0.15) @ torch.ones(3)
        tensor([0.5000, 1.0000, 2.0000])
    """
    check_not_negative(damping=damping)
    if not (0 < power <= 1 and 0 < floor <= 1):
        raise ValueError(f"power and floor must lie in (0, 1], got {power} and {floor}.")
    sizes = diagonal.abs()
    mean = float(sizes.mean()) if sizes.numel() else 0.0
    if mean + damping == 0:
        return DiagonalOperator(torch.ones_like(sizes))
    return DiagonalOperator((sizes.clamp(min=floor * mean) + damping) ** -power)
