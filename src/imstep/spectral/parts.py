"""The trace of an operator that knows independent parts of it, such as the examples of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg import LinearOperator
from imstep.linalg.parts import TraceParts
from imstep.spectral.probes import Samples, student

FREEDOM = 7
"""Degrees of freedom of an error before anything is decided, as eight probes of one number have."""


@dataclass(frozen=True)
class Sampled:
    """What samples say of one group of parameters.

    Attributes:
        value: the trace of those covered.
        error: the true one lies within this of it, with probability 95 %.
    """

    value: float
    error: float


class SampledParts:
    """Traces of groups of parameters from samples that are taken for all of them at once.

    The error is that of the noise alone: each part has a spread of its own over its samples, and the variances of all
    parts add up. How much parts differ from each other is no error.

    Args:
        parts: what is sampled.
        groups: positions of the parameters of each.
        generator: draws.

    Source of the degrees of freedom of a sum of variances: Satterthwaite, Biometrics Bulletin 2 (1946), 110-114.
    """

    def __init__(self, parts: TraceParts, groups: list[list[int]], generator: torch.Generator) -> None:
        self._parts, self._generator, self._samples = parts, generator, Samples()
        covered = torch.tensor(parts.covered, dtype=torch.float64)
        self._sums = torch.zeros(len(covered), len(groups), dtype=torch.float64)
        for at, group in enumerate(groups):
            self._sums[group, at] = covered[group]
        self._exact = parts.exact.cpu() @ self._sums
        self.draw(max(2, 1 + math.ceil(FREEDOM / max(parts.parts, 1))))

    @property
    def count(self) -> int:
        """Samples so far."""
        return self._samples.count

    def draw(self, count: int) -> None:
        """More samples."""
        for _ in range(count):
            self._samples.add((self._parts.sample(self._generator).cpu() @ self._sums)[None])

    def found(self) -> list[Sampled]:
        """Of each group."""
        values = self._exact + self._samples.mean.sum(0)
        variances = self._samples.variance / self.count
        total = variances.sum(0)
        freedom = (self.count - 1) * total**2 / variances.square().sum(0)
        return [
            Sampled(float(value), student(max(1, round(float(free)))) * math.sqrt(var) if var > 0 else float(var))
            for value, var, free in zip(values, total.tolist(), freedom, strict=True)
        ]
