"""Bounds on parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector


@dataclass(frozen=True, eq=False)
class Box:
    """lower <= w <= upper, entry by entry.

    Args:
        lower, upper: (n,), lower <= upper; infinite where there is no bound. Equal ones hold an entry.

    Raises:
        ValueError: shapes differ, a bound is nan, a lower one is above the upper one or infinite on the wrong side.
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        lower, upper = self.lower, self.upper
        if lower.shape != upper.shape or lower.ndim != 1:
            raise ValueError(f"bounds are two vectors of one length, got {tuple(lower.shape)}, {tuple(upper.shape)}.")
        if bool((lower.isnan() | upper.isnan()).any()):
            raise ValueError("a bound is nan. Use -inf and inf where there is no bound.")
        wrong = (lower > upper) | (lower == torch.inf) | (upper == -torch.inf)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"no number lies within the bounds of entry {at}: {float(lower[at])} and {float(upper[at])}. "
                "A lower bound is at most the upper one; no bound is -inf below and inf above."
            )

    def holds(self, w: Tensor) -> bool:
        """Whether w (n,) lies within."""
        return bool(((w >= self.lower) & (w <= self.upper)).all())

    def room(self, w: Tensor, units: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bounds on a step from w (n,), in the units (n,) given; float64."""
        below, above = self.lower.double() - w.double(), self.upper.double() - w.double()
        return (below, above) if units is None else (below * units, above * units)

    def clip(self, parameters: ParameterVector) -> None:
        """Put back within the bounds what rounding has moved beyond."""
        bounds = zip(parameters.unflatten(self.lower), parameters.unflatten(self.upper), strict=True)
        with torch.no_grad():
            for p, (lower, upper) in zip(parameters.tensors, bounds, strict=True):
                p.clamp_(lower, upper)

    def free(self, gradient: Tensor, w: Tensor) -> Tensor:
        """The gradient (n,) at w, 0 where the function falls only beyond a bound."""
        held = ((w <= self.lower) & (gradient > 0)) | ((w >= self.upper) & (gradient < 0)) | (self.lower == self.upper)
        return gradient.masked_fill(held, 0.0)
