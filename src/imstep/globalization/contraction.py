"""How much to damp iterations that keep their linearisation: by how fast they contract."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ContractionDamping:
    """λ from the ratio q of the lengths of the first two corrections of a step.

        accepted at once:    λ <- max(λ clip(q / target, 1/shrink, grow), floor)
        not accepted:        λ <- λ clip(q / target, 2, 10), and the step is tried again
        accepted after that: as at once, with shrink_again in place of shrink

    q measures how far the linearisation holds: halving a step halves it. Iterations whose corrections do not shrink by
    ``limit`` or more are given up. A λ that has just failed would mostly fail again: by default λ falls only once a
    step has been accepted at once.

    Args:
        initial: λ of the first step, relative to the curvature along its gradient, > 0.
        target: the q that is aimed at, 0 < target <= limit.
        limit: the largest ratio of two successive corrections, < 1.
        acceptance: least decrease of an accepted step, as a fraction of what a linear function would have promised,
            in (0, 1).
        shrink, grow: factors by which λ changes at most after an accepted step, >= 1.
        floor: the least λ, > 0: at rounding level a smaller one has no effect.
        shrink_again: the same as ``shrink`` where the step was tried with a smaller λ before.

    Raises:
        ValueError: an argument is out of range.

    Source: Transtrum and Sethna (arXiv 1201.5885) bound geodesic acceleration in this way, which the second correction
        is to leading order; steering λ by it, and to wait after a failure, is our choice.

    Example:
        >>> rule = ContractionDamping(target=0.25)
        >>> rule.after(1e-3, ratio=0.125), rule.again(1e-3, ratio=math.inf)
        (0.0005, 0.01)
        >>> rule.after(1e-2, ratio=0.125, again=True)
        0.01
    """

    initial: float = 1e-5
    target: float = 0.8
    limit: float = 0.95
    acceptance: float = 0.25
    shrink: float = 4.0
    grow: float = 4.0
    floor: float = 1e-16
    shrink_again: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.initial < math.inf:
            raise ValueError(f"damping needs 0 < floor <= initial < inf, got {self.floor} and {self.initial}.")
        if not 0 < self.target <= self.limit < 1:
            raise ValueError(
                f"ratios of corrections need 0 < target <= limit < 1, got {self.target} and {self.limit}."
            )
        if not 0 < self.acceptance < 1:
            raise ValueError(f"acceptance must lie in (0, 1), got {self.acceptance}.")
        factors = self.shrink, self.grow, self.shrink_again
        if not all(1 <= factor < math.inf for factor in factors):
            raise ValueError(f"shrink, grow and shrink_again are factors of at least 1, got {factors}.")

    def accepts(self, ratio: float, decrease: float, promise: float) -> bool:
        """Whether a step is good enough: by its q, and its decrease beside that of its first, linear iterate."""
        return ratio <= self.limit and decrease >= self.acceptance * promise > 0

    def after(self, damping: float, ratio: float, again: bool = False) -> float:
        """λ of the next step after an accepted one; ``again`` where it was tried with a smaller λ before."""
        least = 1 / (self.shrink_again if again else self.shrink)
        return max(damping * min(max(ratio / self.target, least), self.grow), self.floor)

    def again(self, damping: float, ratio: float) -> float:
        """λ to try next in a step whose iterations with λ failed; a ratio that is not finite counts as large."""
        return damping * min(max(ratio / self.target, 2.0), 10.0) if math.isfinite(ratio) else damping * 10.0
