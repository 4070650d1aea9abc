"""Random vectors, their products, and what a handful of samples says of a mean.

Blocks of vectors are rows here, (k, n): a large model's vectors stay in one piece each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imstep.linalg import LinearOperator
from imstep.linalg.dots import row_dots
from imstep.linalg.sharded import summed_over_rows

_STRETCH = 2**14
"""Entries whose products are added up in the dtype of the vectors."""

NORMAL = 1.959963984540054
"""97.5 % of a normal distribution."""


def generator_of(seed: int, generator: torch.Generator | None) -> torch.Generator:
    """The generator given, else one of this seed."""
    return torch.Generator().manual_seed(seed) if generator is None else generator


def signs(operator: LinearOperator, count: int, generator: torch.Generator) -> Tensor:
    """Random signs, (count, n)."""
    drawn = torch.empty(count, operator.size, dtype=operator.dtype, device=generator.device)
    return operator.held(drawn.bernoulli_(0.5, generator=generator).mul_(2).sub_(1).to(operator.device))


def no_rows(operator: LinearOperator) -> Tensor:
    """A block (0, n), to make others like it."""
    return operator.held(torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device))


def images(operator: LinearOperator, rows: Tensor) -> Tensor:
    """A v for each row v, (k, n)."""
    return operator.matmat(rows.mT).mT


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of rows, (k, n) with (m, n): (k, m), float64.

    A product of matrices adds up a million float32 terms one after the other, to four digits: so a stretch at a time.
    """
    return summed_over_rows(first, second, _inner)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    total = torch.zeros(len(first), len(second), dtype=torch.float64, device=first.device)
    for a, b in zip(first.split(_STRETCH, 1), second.split(_STRETCH, 1), strict=True):
        total += (a @ b.mT).double()
    return total


def norms(rows: Tensor) -> Tensor:
    """Norms of rows (k,), float64."""
    squares = row_dots(rows, rows)
    tiny = torch.finfo(rows.dtype).tiny
    if bool(((squares > tiny / torch.finfo(rows.dtype).eps) & torch.isfinite(squares)).all()):
        return squares.sqrt()
    # Squares may leave the range of the dtype where the entries do not.
    scale = rows.abs().double().sum(1).clamp(min=tiny)
    scaled = rows.double() / scale[:, None]
    return row_dots(scaled, scaled).sqrt() * scale


def outside(rows: Tensor, basis: Tensor) -> Tensor:
    """The part of rows (k, n) that is orthogonal to those of an orthonormal basis (m, n)."""
    return rows - inner(rows, basis).to(rows) @ basis if len(basis) else rows


def orthonormal(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows (r, n), r <= k, for what ``rows`` (k, n) add to the span of an orthonormal basis (m, n).

    Source: Stathopoulos and Wu, SIAM J. Sci. Comput. 23 (2002), 2165-2182: eigenvalues of the Gram matrix, which keeps
    to matrix products. A first pass bounds the factors by what the dtype resolves; the next two see the rest.
    """
    eps = torch.finfo(rows.dtype).eps
    largest = float(norms(rows).max()) if len(rows) else 0.0
    if not largest > 0:
        return rows[:0]
    rows = rows / largest
    for later in (False, True, True):
        for _ in range(2):
            rows = outside(rows, basis)
        values, vectors = torch.linalg.eigh(inner(rows, rows))
        if later:
            kept = values > 100 * eps
            values, vectors = values[kept], vectors[:, kept]
        elif not float(values[-1]) > (100 * eps) ** 2:  # nothing but rounding is left
            return rows[:0]
        factors = values.clamp(min=eps * float(values[-1]) if len(values) else 1.0).rsqrt()
        rows = (vectors * factors).mT.to(rows) @ rows
    return rows


class Samples:
    """Mean and spread of independent samples, taken in as they come.

    Attributes:
        count: how many.
        mean: of the samples, of their shape.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, batch: Tensor) -> None:
        """Take in samples (b, ...)."""
        mean, total = batch.mean(0), self.count + len(batch)
        # Squares of float32 leave its range where the samples do not.
        squares = (batch - mean).double().square_().sum(0)
        if self.count == 0:
            self.mean, self._squares = mean, squares
        else:
            shift = mean - self.mean
            self._squares = self._squares + squares + shift.double() ** 2 * (self.count * len(batch) / total)
            self.mean = self.mean + shift * (len(batch) / total)
        self.count = total

    @property
    def half_width(self) -> Tensor:
        """Half of the width of the interval that holds the true mean in 95 % of cases; infinite for one sample."""
        if self.count < 2:
            return torch.full_like(self.mean, math.inf)
        return (student(self.count - 1) * (self.variance / self.count).sqrt()).to(self.mean.dtype)

    @property
    def variance(self) -> Tensor:
        """Of one sample, by at least two; float64."""
        return self._squares / (self.count - 1)


def student(freedom: int) -> float:
    """97.5 % of Student's distribution.

    Source: the expansion about the normal distribution, Abramowitz and Stegun, 26.7.5; off by 1 % for 3 degrees of
    freedom, 0.03 % for 7. Exact for 1 and 2.
    """
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    z = NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
