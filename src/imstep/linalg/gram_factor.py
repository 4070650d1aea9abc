"""A Gram matrix by a factor of low rank that grows block by block."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative
from imstep.linalg.gram import GramMatrix

FIRST = 48
"""Vectors of a first block."""
_GROWTH = 0.5
_LEAST = 16
_MARGIN = 1.15
_HOPELESS = 1.2
"""Times the vectors that there may be: where the last block foresees more, those before would be for nothing."""
LEAST = 4e-14
"""Of the trace: what may be left over at least, since cancellation leaves a quarter of it of a column in float64."""


@dataclass(frozen=True, eq=False)
class GramFactor:
    """K ≈ F Fᵀ from combinations of columns of K: F = K[:, S] R with Rᵀ K[S, S] R = I.

    What is missing, K - F Fᵀ, is positive semidefinite. If K = J Jᵀ, the columns of Jᵀ[:, S] R are an orthonormal basis
    of a part of the span of the rows of J, and F is J in that basis.

    Attributes:
        factor: F, (N, k).
        combination: R, (p, k), p >= k.
        remainder: the trace of K - F Fᵀ, which bounds its largest eigenvalue.
        pivots: S, (p,); an index may stand there twice. None where all columns take part: p = N.
    """

    factor: Tensor
    combination: Tensor
    remainder: float
    pivots: Tensor | None = None

    @property
    def rank(self) -> int:
        """k."""
        return self.factor.shape[1]


@dataclass(frozen=True, eq=False)
class Probe:
    """A block of q test vectors Ω: K Ω, and what makes Ωᵀ X of any X."""

    images: Tensor
    inner: Callable[[Tensor], Tensor]


def grow(
    matrix: GramMatrix,
    tolerance: float,
    probe: Callable[[Tensor, Tensor, int], Probe],
    most: int = sys.maxsize,
) -> tuple[Tensor, Tensor, float]:
    """K Ω (Ωᵀ K Ω)⁺ Ωᵀ K for test vectors Ω that are taken in blocks until the trace of what they leave is small.

    A block is at most half as large as all before, smaller where the last one has shown that fewer vectors will do. It
    is freed of what those have found: without that, the square of a large eigenvalue's rounding would hide the small
    ones.

    Args:
        matrix: K.
        tolerance: for the trace, >= 0; with 0 it goes on to the rank that rounding allows.
        probe: makes a block of up to so many vectors, given the diagonal of what is left (N,) and F so far.
        most: test vectors at most; it stops before a block that would be more, and where many more are to be expected.

    Returns:
        F (N, k) with F Fᵀ the approximation, R (p, k) with F = K Ω R, and the trace of K - F Fᵀ.
    """
    check_not_negative(tolerance=tolerance)
    left = matrix.diagonal().clamp(min=0)
    remainder = float(left.sum())
    least, size = LEAST / 4 * remainder, matrix.size
    tolerance, count = max(tolerance, 4 * least), FIRST
    factor, combination = left.new_zeros(size, 0), left.new_zeros(0, 0)
    while remainder > tolerance and factor.shape[1] < size and len(combination) + min(count, size) <= most:
        new = probe(left, factor, count)
        known = new.inner(factor)
        columns = torch.addmm(new.images, factor, known.mT, alpha=-1)
        root = _inverse_root(new.inner(columns), least)
        if root.shape[1] == 0:
            break
        upper = torch.cat([combination, -combination @ (known.mT @ root)], 1)
        lower = torch.cat([root.new_zeros(len(root), factor.shape[1]), root], 1)
        combination = torch.cat([upper, lower])
        added = columns @ root
        factor = torch.cat([factor, added], 1)
        left = (left - added.square().sum(1)).clamp_(min=0)
        before, remainder = remainder, float(left.sum())
        count = next_block(len(combination), len(root), before, remainder, tolerance, most)
    return factor, combination, remainder


def next_block(taken: int, last: int, before: float, after: float, tolerance: float, most: int) -> int:
    """How many vectors the next block has, after ``taken``, of which the ``last`` few left ``after`` of ``before``.

    At most half of those taken, no more than are to be expected, and no more than there may be; but more than ``most``
    where what is to be expected is far too many.
    """
    count = max(FIRST, int(_GROWTH * taken))
    if not tolerance < after < before:
        return count
    needed = _needed(before, after, last, tolerance)
    return needed if taken + needed > _HOPELESS * most else max(_LEAST, min(count, needed, most - taken))


def _needed(before: float, after: float, count: int, tolerance: float) -> int:
    """Vectors to the tolerance if each leaves the same fraction of the trace as ``count`` did on average."""
    return math.ceil(_MARGIN * count * math.log(after / tolerance) / math.log(before / after))


def _inverse_root(block: Tensor, least: float) -> Tensor:
    """B with Bᵀ W B = I for a positive semidefinite W, on the eigenvectors that rounding has not spoilt.

    What is left out may be met again, once the larger part of it is gone.
    """
    values, vectors = torch.linalg.eigh((block + block.mT) / 2)
    kept = values > max([least, *(1e-12 * values[-1:])])
    return vectors[:, kept] * values[kept].rsqrt()
