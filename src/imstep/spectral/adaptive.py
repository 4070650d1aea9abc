"""Linear functions of a matrix from random probes, after the directions in which it is large have been taken out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imstep.linalg import LinearOperator
from imstep.spectral.probes import Samples, images, no_rows, orthonormal, outside, signs
from imstep.spectral.units import InUnits

_FIRST = 8
"""Probes before anything is decided; fewer would not tell their own spread."""

_TRIED = 32
"""Directions that are taken out before growth must have paid: a spectrum may fall only beyond the first few."""

_BEYOND = 1e9
"""Times the error asked for above which how much is missing does not matter."""

_ROOM = 2**30
"""Bytes that the directions taken out may fill."""


def check_limits(rtol: float, atol: float, max_products: int) -> None:
    """Raise if they are out of range."""
    if not (rtol >= 0 and atol >= 0 and max_products >= 1):
        raise ValueError(
            f"rtol and atol are at least 0 and max_products at least 1, got {rtol}, {atol} and {max_products}."
        )


class Functional(ABC):
    """A linear function of a matrix: what is known of it from Q, and a sample of the rest."""

    @abstractmethod
    def known(self, operator: LinearOperator, directions: Tensor) -> Tensor:
        """What orthonormal directions (k, n) contribute; k products."""

    @abstractmethod
    def sample(self, operator: LinearOperator, probes: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Samples of the rest (b, ...) from signs (b, n), and the products (b, n) that were made."""

    @abstractmethod
    def of_diagonal(self, entries: Tensor) -> Tensor:
        """The function itself, of the diagonal (n,)."""


class Trace(Functional):
    """The sum of the diagonal."""

    def known(self, operator: LinearOperator, directions: Tensor) -> Tensor:
        return (directions * images(operator, directions)).sum(dtype=torch.float64)

    def sample(self, operator: LinearOperator, probes: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        probes = outside(probes, basis)
        made = images(operator, probes)
        return (probes * made).sum(1, dtype=torch.float64), made

    def of_diagonal(self, entries: Tensor) -> Tensor:
        return entries.sum(dtype=torch.float64)


class Diagonal(Functional):
    """The diagonal."""

    def known(self, operator: LinearOperator, directions: Tensor) -> Tensor:
        return (directions * operator.rmatmat(directions.mT).mT).sum(0)

    def sample(self, operator: LinearOperator, probes: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        made = images(operator, probes)
        return probes * outside(made, basis), made

    def of_diagonal(self, entries: Tensor) -> Tensor:
        return entries


@dataclass(frozen=True, eq=False)
class Mean:
    """What an estimation ended with."""

    value: Tensor
    error: Tensor
    products: int
    converged: bool


class Adaptive:
    """An estimate that gets better as products are spent, where they bring most.

    Args:
        operator: A, square.
        functional: what is estimated.
        generator: draws the probes.
    """

    def __init__(self, operator: LinearOperator, functional: Functional, generator: torch.Generator) -> None:
        self._operator, self._functional, self._generator = InUnits(operator), functional, generator
        self._basis = self._sketch = no_rows(operator)
        self._known, self._rest, self._products = torch.zeros((), device=operator.device), Samples(), 0
        self._most = max(_FIRST, _ROOM // max(1, operator.size * operator.dtype.itemsize))

    def to(self, rtol: float, atol: float, max_products: int) -> Mean:
        """The estimate whose error is at most max(atol, rtol · its size), or the best for so many products."""
        check_limits(rtol, atol, max_products)
        found, unit = self._in_units(rtol, atol, max_products), self._operator.unit
        return found if unit == 1 else replace(found, value=unit * found.value, error=unit * found.error)

    def _in_units(self, rtol: float, atol: float, max_products: int) -> Mean:
        size = self._operator.size
        if size <= 2 * _FIRST:
            return self._exact()
        self._sample(min(_FIRST, max_products))
        pays = True
        while (missing := self._missing(rtol, atol)) > 0 and self._products < max_products:
            added = min(max(_FIRST, len(self._basis)), self._most - len(self._basis))
            growth = 2 * added - len(self._sketch) + _FIRST
            left = max_products - self._products
            if missing >= size and 2 * (self._products + growth) >= size and left >= size:
                return self._exact()
            if not (pays and added > 0 and min(missing, left) > growth):
                # What is missing is itself uncertain: at most as many again before it is asked anew.
                self._sample(int(min(missing, left, max(self._rest.count, _FIRST))))
            elif len(self._sketch) < added:
                self._sample(added - len(self._sketch))
            else:
                self._grow(added)
                pays = len(self._basis) < _TRIED or self._missing(rtol, atol) < missing - growth
        value = self._known + self._rest.mean
        rounding = 10 * torch.finfo(self._operator.dtype).eps * (self._known.abs() + self._rest.mean.abs())
        return Mean(value, self._rest.half_width + rounding, self._products, missing == 0)

    def _missing(self, rtol: float, atol: float) -> float:
        """How many more samples would reach the error, were they spread as those before; nan if some are not finite."""
        norm = lambda t: float(torch.linalg.vector_norm(t, dtype=torch.float64))
        error, value = norm(self._rest.half_width), norm(self._known + self._rest.mean)
        target = max(atol / self._operator.unit, rtol * value)
        if not math.isfinite(value):
            return math.nan
        if error <= target:
            return 0
        excess = error / target if target > 0 else math.inf
        return math.ceil(self._rest.count * (excess**2 - 1)) if excess < _BEYOND else math.inf

    def _sample(self, count: int) -> None:
        """Probes of what is not known; their products are kept as far as a basis twice as large would need them."""
        for start in range(0, count, _FIRST):
            probes = signs(self._operator, min(_FIRST, count - start), self._generator)
            samples, made = self._functional.sample(self._operator, probes, self._basis)
            self._rest.add(samples)
            self._products += len(samples)
            room = max(_FIRST, len(self._basis)) - len(self._sketch)
            self._sketch = torch.cat([self._sketch, made[:room]])
            if not bool(torch.isfinite(samples).all()):
                return

    def _grow(self, added: int) -> None:
        """Take directions of the last products out, and begin to sample what is left."""
        directions = orthonormal(self._sketch[:added], self._basis)
        self._known = self._known + self._functional.known(self._operator, directions)
        self._products += len(directions)
        self._basis = torch.cat([self._basis, directions])
        self._sketch, self._rest = self._sketch[:0], Samples()
        self._sample(_FIRST)

    def _exact(self) -> Mean:
        """By all n products."""
        size, operator = self._operator.size, self._operator
        entries = torch.empty(size, dtype=operator.dtype, device=operator.device)
        block = max(1, min(256, 2**24 // max(size, 1)))
        for start in range(0, size, block):
            count = min(block, size - start)
            units = torch.zeros(count, size, dtype=operator.dtype, device=operator.device)
            units.diagonal(start).fill_(1)
            entries[start : start + count] = images(operator, units).diagonal(start)
        entries = operator.held(entries)
        rounding = 10 * torch.finfo(operator.dtype).eps * entries.abs()
        value, error = self._functional.of_diagonal(entries), self._functional.of_diagonal(rounding)
        return Mean(value, error, self._products + size, bool(torch.isfinite(value).all()))
