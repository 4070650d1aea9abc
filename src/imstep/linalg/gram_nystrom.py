"""A positive semidefinite matrix by random combinations of its columns: Nyström approximation of a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from imstep.linalg.gram import GramMatrix
from imstep.linalg.gram_factor import GramFactor, Probe, grow
from imstep.linalg.precision import full_precision


@full_precision
def gram_nystrom(matrix: GramMatrix, tolerance: float, *, generator: torch.Generator) -> GramFactor:
    """Take random combinations of the columns of K until the trace of what they leave is at most a tolerance.

        K ≈ K Ω (Ωᵀ K Ω)⁺ Ωᵀ K,   Ω (N, p) random with normal numbers

    Where :func:`partial_cholesky` takes p columns, this mixes all N of them: it leaves less for the same p, and a mix
    costs more than a column.

    Args:
        matrix: K.
        tolerance: >= 0; with 0 the approximation goes on to the rank that rounding allows.
        generator: draws Ω, on its own device.

    Raises:
        ValueError: the tolerance is negative or not finite.

    Cost: p products with K, in blocks; about N p² operations, of which partial Cholesky takes some less, and 2 N p
        numbers.

    Source: Gittens and Mahoney (arXiv 1303.1849), for Gaussian Ω; Frangella, Tropp and Udell (arXiv 2110.02820),
        Algorithm 2.1, which shifts K against rounding, where we leave out directions that rounding has spoilt, so that
        F stays J in an orthonormal basis; the growing blocks are our choice, their error is known from the diagonal.

    Example:
        >>> from imstep.linalg import DenseGram
        >>> rows = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None] ** torch.arange(5)
        >>> found = gram_nystrom(DenseGram(rows @ rows.T), 1e-8, generator=torch.Generator().manual_seed(0))
        >>> found.rank, bool((found.factor @ found.factor.T - rows @ rows.T).abs().max() < 1e-8)
        (5, True)
    """
    drawn = [torch.zeros(matrix.size, 0, dtype=matrix.dtype, device=matrix.device)]

    def probe(left: Tensor, factor: Tensor, count: int) -> Probe:
        shape = (matrix.size, min(count, matrix.size))
        new = torch.randn(shape, generator=generator, device=generator.device, dtype=matrix.dtype).to(matrix.device)
        new = torch.linalg.qr(new)[0]  # the same span: what rounding spoils is then told by the size of an eigenvalue
        drawn.append(new)
        return Probe(matrix.matmat(new), lambda block: new.mT @ block)

    factor, combination, remainder = grow(matrix, tolerance, probe)
    return GramFactor(factor, torch.cat(drawn, 1)[:, : len(combination)] @ combination, remainder)
