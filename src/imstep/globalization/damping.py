"""How much to damp the curvature from step to step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class Damping(ABC):
    """A rule for the λ in (A + λI) x = b. Pure: the caller keeps λ."""

    @property
    @abstractmethod
    def initial(self) -> float:
        """λ of the first step."""

    @abstractmethod
    def update(self, damping: float, rho: float) -> float:
        """λ of the next step after one with damping λ and the ratio rho of actual to predicted decrease."""


@dataclass(frozen=True)
class LevenbergMarquardt(Damping):
    """λ <- factor λ if rho < lower, λ / factor if rho > upper, within [floor, ceiling].

    A rho that is not a number counts as failure.

    Args:
        initial: λ of the first step, in [floor, ceiling].
        factor: > 1.
        lower, upper: 0 <= lower < upper.
        floor, ceiling: 0 < floor <= ceiling, finite; the floor keeps λ able to grow again.

    Raises:
        ValueError: an argument is out of range.

    Source: Marquardt (1963); thresholds as in Martens (2010), section 4.1, and Nocedal & Wright, Algorithm
    4.1; factor, initial and floor are our choice by measurement.

    Example:
        >>> rule = LevenbergMarquardt(initial=1e-3)
        >>> rule.update(rule.initial, rho=0.1), rule.update(rule.initial, rho=0.9)
        (0.002, 0.0005)
    """

    initial: float = 1e-3
    factor: float = 2.0
    lower: float = 0.25
    upper: float = 0.75
    floor: float = 1e-9
    ceiling: float = 1e6

    def __post_init__(self) -> None:
        if not (0 < self.floor <= self.initial <= self.ceiling < math.inf):
            raise ValueError(
                "damping needs 0 < floor <= initial <= ceiling, got "
                f"{self.floor}, {self.initial} and {self.ceiling}. "
                "For no damping use NoDamping()."
            )
        if not (self.factor > 1 and 0 <= self.lower < self.upper):
            raise ValueError(
                "damping needs factor > 1 and 0 <= lower < upper, got "
                f"{self.factor}, {self.lower} and {self.upper}."
            )

    def update(self, damping: float, rho: float) -> float:
        if rho > self.upper:
            return max(damping / self.factor, self.floor)
        if rho >= self.lower:
            return damping
        return min(damping * self.factor, self.ceiling)


@dataclass(frozen=True)
class NoDamping(Damping):
    """λ = 0 always: the method to the letter.

    Example:
        >>> NoDamping().update(0.0, rho=-1.0)
        0.0
    """

    @property
    def initial(self) -> float:
        return 0.0

    def update(self, damping: float, rho: float) -> float:
        return 0.0
