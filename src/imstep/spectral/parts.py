"""The trace of an operator that knows independent parts of it, such as the examples of a batch."""

from __future__ import annotations

import math

import torch

from imstep.linalg import LinearOperator
from imstep.linalg.parts import TraceParts
from imstep.spectral.adaptive import Adaptive, Mean, Trace, check_limits
from imstep.spectral.probes import Samples, generator_of, student
from imstep.spectral.results import Estimate

_FREEDOM = 15
"""Degrees of freedom of an error before anything is decided, as sixteen probes of one number have."""

_LEAST = 128
"""Products that may be spent, or rows of the matrix, below which no parts are looked for: that may cost as many, and as
many multiply such a matrix out."""


def traces_by_parts(
    operator: LinearOperator,
    rtol: float,
    atol: float,
    seed: int,
    generator: torch.Generator | None,
    max_products: int,
    by: str | None,
) -> dict[str, Estimate] | None:
    """The traces of groups of parameters, see :func:`~imstep.spectral.trace`; None where no parts are known.

    Samples are taken of all groups at once. A group that would take more of them than it has rows is left to its
    products, and so is what no part covers.
    """
    check_limits(rtol, atol, max_products)
    parts = operator.trace_parts() if min(max_products, *operator.shape) >= _LEAST else None
    if parts is None:
        return None
    generator = generator_of(seed, generator)
    names = parts.groups(by)
    sampled = _Sampled(parts, list(names.values()), generator)
    groups = [_Group(parts, own, (rtol, atol), max_products, generator) for own in names.values()]
    while True:
        sums = sampled.sums()
        wanted = max(group.wanted(*own, sampled.count) for group, own in zip(groups, sums, strict=True))
        more = min(wanted, sampled.count, max_products - parts.products)
        if more <= 0:
            return {name: group.estimate() for name, group in zip(names, groups, strict=True)}
        sampled.draw(more)


class _Sampled:
    """Traces of groups of parameters, as far as they are covered, from samples taken for all of them at once.

    The error is that of the noise alone: each part has a spread of its own over its samples, and the variances of all
    parts add up. How much parts differ from each other is no error.

    Source of the degrees of freedom of a sum of variances: Satterthwaite, Biometrics Bulletin 2 (1946), 110-114.
    """

    def __init__(self, parts: TraceParts, groups: list[list[int]], generator: torch.Generator) -> None:
        self._parts, self._generator, self._samples = parts, generator, Samples()
        self._members = torch.zeros(len(parts.covered), len(groups), dtype=torch.float64)
        for at, group in enumerate(groups):
            self._members[[p for p in group if parts.covered[p]], at] = 1
        self._exact = parts.exact.cpu() @ self._members
        self.draw(max(2, 1 + math.ceil(_FREEDOM / max(parts.parts, 1))))

    @property
    def count(self) -> int:
        """Samples so far."""
        return self._samples.count

    def draw(self, count: int) -> None:
        """More samples."""
        for _ in range(count):
            self._samples.add((self._parts.sample(self._generator).cpu() @ self._members)[None])

    def sums(self) -> list[tuple[float, float]]:
        """Value and error of each group."""
        variances = self._samples.variance / self.count
        total = variances.sum(0)
        freedom = (self.count - 1) * total**2 / variances.square().sum(0)
        values = self._exact + self._samples.mean.sum(0)
        found = []
        for value, variance, free in zip(values.tolist(), total.tolist(), freedom.tolist(), strict=True):
            factor = student(max(1, int(free))) if math.isfinite(free) else 1.0
            found.append((value, factor * math.sqrt(variance) if variance >= 0 else math.nan))
        return found


class _Group:
    """The trace of a diagonal block, of which some comes from samples and the rest from products."""

    def __init__(
        self,
        parts: TraceParts,
        group: list[int],
        limits: tuple[float, float],
        max_products: int,
        generator: torch.Generator,
    ) -> None:
        self._parts, self._group, (self._rtol, self._atol) = parts, group, limits
        self._max_products, self._generator = max_products, generator
        left = [at for at in group if not parts.covered[at]]
        self._rest = Adaptive(parts.block(left), Trace(), generator) if left else None
        self._size = parts.block(group).size
        self._sampled = 0.0, math.inf
        self._beside: Mean | None = None
        self._whole: Mean | None = None

    def wanted(self, value: float, error: float, count: int) -> int:
        """How many more samples than ``count``, which have led to a value and its error, would do."""
        self._sampled = value, error
        if self._whole is not None:
            return 0
        if self._rest is not None and self._beside is None:
            self._beside = self._rest.to(0.5, self._atol, self._left())
        share = self._share()
        while self._rest is not None and error <= share < self._beside_error() and self._left() > 1:
            self._beside = self._rest.to(0.0, share, self._left())
            share = self._share()
            if not self._beside.converged:
                return 0
        if error <= share or not math.isfinite(value + error):
            return 0
        total = count * (error / share) ** 2 if share > 0 else math.inf
        if total <= self._size:
            return max(1, math.ceil(total) - count)
        self._whole = Adaptive(self._parts.block(self._group), Trace(), self._generator).to(
            self._rtol, self._atol, self._left()
        )
        return 0

    def estimate(self) -> Estimate:
        """What was found."""
        if self._whole is not None:
            products = self._parts.products + self._spent() + self._whole.products
            return Estimate(float(self._whole.value), float(self._whole.error), products, self._whole.converged)
        value, error = self._value(), math.hypot(self._sampled[1], self._beside_error())
        converged = error <= self._target() and math.isfinite(value)
        error += 10 * self._parts.accuracy * abs(value)
        return Estimate(value, error, self._parts.products + self._spent(), converged)

    def _value(self) -> float:
        return self._sampled[0] + (0.0 if self._beside is None else float(self._beside.value))

    def _target(self) -> float:
        return max(self._atol, self._rtol * abs(self._value()))

    def _share(self) -> float:
        """What samples may err by, and products beside them as well."""
        return self._target() if self._rest is None else self._target() / math.sqrt(2)

    def _beside_error(self) -> float:
        return 0.0 if self._beside is None else float(self._beside.error)

    def _spent(self) -> int:
        return 0 if self._beside is None else self._beside.products

    def _left(self) -> int:
        return max(1, self._max_products - self._parts.products - self._spent())
