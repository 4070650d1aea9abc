"""A claim, and the figures that bear it out or do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Claim", "Figure", "at_least", "at_most"]


@dataclass(frozen=True)
class Figure:
    """A measured number and what it has to be; nan meets nothing.

    Args:
        name: what was measured.
        value: the number.
        bound: its bound.
        most: whether the bound is from above.

    Example:
        >>> str(at_most("error", 2e-16, 1e-14)), at_least("order", 1.2, 1.4).met
        ('error 2e-16 (at most 1e-14)', False)
    """

    name: str
    value: float
    bound: float
    most: bool

    @property
    def met(self) -> bool:
        """Whether the number keeps its bound."""
        return self.value <= self.bound if self.most else self.value >= self.bound

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} (at {'most' if self.most else 'least'} {self.bound:g})"


def at_most(name: str, value: float, bound: float) -> Figure:
    """A figure with a bound from above."""
    return Figure(name, value, bound, most=True)


def at_least(name: str, value: float, bound: float) -> Figure:
    """A figure with a bound from below."""
    return Figure(name, value, bound, most=False)


@dataclass(frozen=True)
class Claim:
    """A claim of the abstract.

    Args:
        name: for the command line.
        words: what is claimed.
        check: measures; seconds on one core.
        further: the commands that show it at length.
    """

    name: str
    words: str
    check: Callable[[], Sequence[Figure]]
    further: str
