"""How large a batch has to be for its gradient to be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class NormTest:
    """A batch is large enough while its gradient's variance is at most θ² ‖g‖²; otherwise it grows, and never shrinks.

        size <- size · variance / (θ² ‖g‖²),   at most ``growth`` times as large at once

    The variance is that of examples drawn independently; drawn from an epoch without replacement they have a little
    less, which is left out of account.

    Args:
        theta: the relative error that a gradient may have, > 0.
        growth: > 1.

    Raises:
        ValueError: an argument is out of range.

    Source: Byrd, Chin, Nocedal and Wu, Math. Program. 134 (2012), 127-155, section 3; the numbers, and the bound on a
        single growth, are our choice.

    Example:
        >>> NormTest().size(32, variance=0.3, squared_norm=1.0)
        39
        >>> NormTest().size(32, variance=0.2, squared_norm=1.0)
        32
    """

    theta: float = 0.5
    growth: float = 2.0

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ValueError(f"theta, the relative error that a gradient may have, is above 0, got {self.theta}.")
        if not 1 < self.growth < math.inf:
            raise ValueError(f"growth, the most that a batch grows at once, is above 1, got {self.growth}.")

    def size(self, size: int, variance: float, squared_norm: float) -> int:
        """The size that batches of ``size`` examples should have, when their gradient has such a variance and ‖g‖²."""
        allowed = self.theta**2 * squared_norm
        if not variance > allowed:  # nor where either is not a number
            return size
        return math.ceil(size * (min(variance / allowed, self.growth) if allowed > 0 else self.growth))
