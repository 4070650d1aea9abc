"""The best approximation of a matrix by one of low rank."""

from __future__ import annotations

import torch

from imstep.linalg import LinearOperator, LowRankOperator, as_operator
from imstep.spectral.eigenpairs import eigenpairs
from imstep.uncompiled import uncompiled


@uncompiled
def low_rank(
    operator: LinearOperator,
    k: int,
    tol: float = 1e-4,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    max_products: int | None = None,
) -> LowRankOperator:
    """The eigenpairs of largest magnitude as an operator: no matrix of rank k is nearer to A.

        A ≈ V diag(θ) Vᵀ,   ‖A - V diag(θ) Vᵀ‖ = |λ| of the next eigenvalue

    Args:
        operator: A, self-adjoint, of size n.
        k: the rank, in [1, n].
        tol, seed, generator, max_products: as for :func:`~imstep.spectral.eigenpairs`.

    Returns:
        A :class:`~imstep.linalg.LowRankOperator`, which belongs to the same parameters as A.

    Cost: as :func:`~imstep.spectral.eigenpairs`.

    Source: Eckart and Young, Psychometrika 1 (1936), 211-218; Mirsky (1960) for the spectral norm.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> low_rank(DiagonalOperator(torch.tensor([1.0, -5.0, 3.0])), k=2) @ torch.ones(3)
        tensor([ 0., -5.,  3.])
    """
    operator = as_operator(operator)
    found = eigenpairs(operator, k, "LM", tol, seed=seed, generator=generator, max_products=max_products)
    return LowRankOperator(found.vectors, found.values, space=operator.spaces[1])
