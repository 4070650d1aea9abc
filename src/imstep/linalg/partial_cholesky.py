"""A positive semidefinite matrix by few of its columns: partial Cholesky factorisation with pivots."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep.linalg.gram import GramMatrix
from imstep.linalg.gram_factor import GramFactor, Probe, grow


def partial_cholesky(matrix: GramMatrix, tolerance: float) -> GramFactor:
    """Take columns of K until the trace of what they leave is at most a tolerance.

        K ≈ K[:, S] K[S, S]⁺ K[S, :]

    Pivots are taken in blocks, each half as large as all before, spread evenly over the cumulated diagonal of what is
    left: in proportion to it, and without chance.

    Args:
        matrix: K.
        tolerance: >= 0; with 0 the factorisation goes on to the rank that rounding allows.

    Raises:
        ValueError: the tolerance is negative or not finite.

    Cost: p columns of K, about N p² operations and N p numbers; p grows with the number of eigenvalues of K above the
        tolerance, whatever N.

    Source: Chen, Epperly, Tropp and Webber, "Randomly pivoted Cholesky" (arXiv 2207.06503); the spread in place
        of chance, and the growing blocks, are our choice.

    Example:
        >>> from imstep.linalg import DenseGram
        >>> rows = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None] ** torch.arange(5)
        >>> found = partial_cholesky(DenseGram(rows @ rows.T), tolerance=1e-8)
        >>> found.rank, bool((found.factor @ found.factor.T - rows @ rows.T).abs().max() < 1e-8)
        (5, True)
    """
    chosen = [torch.zeros(0, dtype=torch.long, device=matrix.device)]

    def probe(left: Tensor, count: int) -> Probe:
        new = _spread(left, count)
        chosen.append(new)
        return Probe(matrix.columns(new), lambda block: block[new])

    factor, combination, remainder = grow(matrix, tolerance, probe)
    return GramFactor(factor, combination, remainder, torch.cat(chosen)[: len(combination)])


def _spread(weights: Tensor, count: int) -> Tensor:
    """Up to ``count`` different indices at even steps of the cumulated weights."""
    cumulated = weights.cumsum(0)
    steps = (torch.arange(count, dtype=weights.dtype, device=weights.device) + 0.5) / count * cumulated[-1]
    return torch.searchsorted(cumulated, steps).clamp_(max=len(weights) - 1).unique()
