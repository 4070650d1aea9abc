"""A positive semidefinite matrix by few of its columns: partial Cholesky factorisation with pivots."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imstep.linalg.gram import GramMatrix
from imstep.linalg.gram_factor import GramFactor, Probe, grow
from imstep.linalg.precision import full_precision

CANDIDATES = 3
"""For each pivot."""
_SPOILT = 1e-12  # of the largest diagonal entry: what rounding leaves of the others


@full_precision
def partial_cholesky(matrix: GramMatrix, tolerance: float, *, most: int = sys.maxsize) -> GramFactor:
    """Take columns of K until the trace of what they leave is at most a tolerance.

        K ≈ K[:, S] K[S, S]⁺ K[S, :]

    Pivots are taken in blocks, each at most half as large as all before. Three candidates for each are spread evenly
    over the cumulated diagonal of what is left, in proportion to it and without chance; of these the pivots are those
    that a greedy Cholesky factorisation takes first.

    Args:
        matrix: K.
        tolerance: >= 0; with 0 the factorisation goes on to the rank that rounding allows.
        most: columns at most, >= 0, however much they leave.

    Raises:
        ValueError: the tolerance is negative or not finite.

    Cost: p columns of K, about N p² operations and N p numbers; p grows with the number of eigenvalues of K above the
        tolerance, whatever N.

    Source: Chen, Epperly, Tropp and Webber, "Randomly pivoted Cholesky" (arXiv 2207.06503); that a block is thinned out
        by the entries among its candidates, Epperly, Tropp and Webber (arXiv 2410.03969), who reject at random; the
        spread in place of chance, the greedy choice and the growing blocks are ours.

    Example:
        >>> from imstep.linalg import DenseGram
        >>> rows = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None] ** torch.arange(5)
        >>> found = partial_cholesky(DenseGram(rows @ rows.T), tolerance=1e-8)
        >>> found.rank, bool((found.factor @ found.factor.T - rows @ rows.T).abs().max() < 1e-8)
        (5, True)
    """
    chosen = [torch.zeros(0, dtype=torch.long, device=matrix.device)]

    def probe(left: Tensor, factor: Tensor, count: int) -> Probe:
        candidates = spread(left, CANDIDATES * count)
        known = factor[candidates]
        block = matrix.entries(candidates, candidates).addmm_(known, known.mT, alpha=-1)
        new = candidates[greedy_pivots(block, count)]
        chosen.append(new)
        return Probe(matrix.columns(new), lambda block: block[new])

    factor, combination, remainder = grow(matrix, tolerance, probe, most)
    return GramFactor(factor, combination, remainder, torch.cat(chosen)[: len(combination)])


def spread(weights: Tensor, count: int) -> Tensor:
    """Up to ``count`` different indices at even steps of the cumulated weights."""
    cumulated = weights.cumsum(0)
    steps = (torch.arange(count, dtype=weights.dtype, device=weights.device) + 0.5) / count * cumulated[-1]
    return torch.searchsorted(cumulated, steps).clamp_(max=len(weights) - 1).unique()


def greedy_pivots(block: Tensor, count: int) -> Tensor:
    """The first pivots, up to ``count``, of a Cholesky factorisation that takes the largest entry of the diagonal."""
    entries: Any = block.cpu().numpy()  # with a fraction of a tensor's overhead for each of many short operations
    left = entries.diagonal().copy()
    factor = np.zeros((min(count, len(entries)), len(entries)))
    floor, pivots = _SPOILT * left.max(), []
    for j, row in enumerate(factor):
        pivot = int(left.argmax())
        if not left[pivot] > floor:
            break
        pivots.append(pivot)
        column = entries[pivot] - factor[:j, pivot] @ factor[:j]
        row[:] = column / math.sqrt(column[pivot])
        left -= row * row
        left[pivot] = 0
    return torch.tensor(pivots, dtype=torch.long, device=block.device)
