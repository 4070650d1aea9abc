"""Bounds on parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.curvature.processes import Processes


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

    def divided(self, units: Tensor) -> Box:
        """Of w / units, (n,): such that rounding of the product takes nothing beyond the bounds."""
        lower, upper, end = self.lower / units, self.upper / units, torch.full_like(units, torch.inf)
        lower = torch.where(lower * units < self.lower, torch.nextafter(lower, end), lower)
        upper = torch.where(upper * units > self.upper, torch.nextafter(upper, -end), upper)
        return Box(torch.minimum(lower, upper), upper)

    def clamped(self, w: Tensor) -> Tensor:
        """w, of any shape with n entries, moved to within."""
        return w.reshape(-1).clamp(self.lower, self.upper).view_as(w)

    def room(self, w: Tensor, units: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bounds on a step from w (n,), in the units (n,) given; float64."""
        below, above = self.lower.double() - w.double(), self.upper.double() - w.double()
        return (below, above) if units is None else (below * units, above * units)

    def free(self, gradient: Tensor, w: Tensor) -> Tensor:
        """The gradient (n,) at w, 0 where the function falls only beyond a bound."""
        return gradient.masked_fill(self.held(gradient, w), 0.0)

    def held(self, gradient: Tensor, w: Tensor) -> Tensor:
        """Which entries (n,) a bound holds back: of the others the function may be lowered to first order."""
        return ((w <= self.lower) & (gradient > 0)) | ((w >= self.upper) & (gradient < 0)) | (self.lower == self.upper)


class BoxedParameters(ParameterVector):
    """Parameters that no move takes beyond their bounds.

    Raises:
        ValueError: the box has another size, or the parameters lie outside.
    """

    def __init__(self, params: Iterable[Tensor], box: Box, processes: Processes | None = None) -> None:
        super().__init__(params, processes)
        if box.lower.numel() != self.size:
            raise ValueError(f"there are bounds for {box.lower.numel()} entries, and {self.size} parameters.")
        w = self.get()
        outside = (w < box.lower) | (w > box.upper)
        if bool(outside.any()):
            raise ValueError(_outside(outside, w, box))
        bounds = zip(self.unflatten(box.lower), self.unflatten(box.upper), strict=True)
        self._bounds = [(lower.clone(), upper.clone()) for lower, upper in bounds]

    def move(self, snapshot: Sequence[Tensor], direction: Tensor, step_length: float) -> None:
        super().move(snapshot, direction, step_length)
        with torch.no_grad():
            for p, saved, (lower, upper) in zip(self.tensors, snapshot, self._bounds, strict=True):
                # A step to a bound, w + (bound - w), ends by rounding beside it.
                spacing = 2 * torch.finfo(p.dtype).eps
                for bound in (lower, upper):
                    near = (p - bound).abs() <= spacing * torch.maximum(bound.abs(), saved.abs())
                    p.copy_(torch.where(near & bound.isfinite(), bound, p))
                p.clamp_(lower, upper)


def box_of(bounds: Any, start: Tensor, units: Tensor) -> Box | None:
    """Bounds as SciPy takes them, on start / units.

    Args:
        bounds: an object with ``lb`` and ``ub``, such as ``scipy.optimize.Bounds``; a pair of numbers, arrays or
            tensors (lower, upper), each for all entries or like ``start``; or one pair (lower, upper) for each entry,
            None where there is no bound, or an array of such pairs. None for no bounds.

    Raises:
        ValueError, TypeError: it is none of these, or :class:`Box` refuses it.
    """
    if bounds is None:
        return None
    lower, upper = _sides(bounds, start.numel())
    sides = []
    for side, none in ((lower, -torch.inf), (upper, torch.inf)):
        values = [none if value is None else value for value in side] if isinstance(side, list) else side
        tensor = torch.as_tensor(values, dtype=start.dtype, device=start.device).detach()
        if tensor.numel() not in (1, start.numel()):
            raise ValueError(
                f"a side of bounds has shape {tuple(tensor.shape)}, x0 {tuple(start.shape)}. Give one number, or one "
                "for each entry."
            )
        whole = tensor.reshape(-1).expand(start.numel()) if tensor.numel() == 1 else tensor.reshape(-1)
        sides.append(whole)
    inside = Box(*sides)
    outside = (start.reshape(-1) < inside.lower) | (start.reshape(-1) > inside.upper)
    if bool(outside.any()):
        raise ValueError(_outside(outside, start.reshape(-1), inside))
    return inside.divided(units.expand(start.shape).reshape(-1))


def _outside(outside: Tensor, w: Tensor, box: Box) -> str:
    """Which of the entries are not within their bounds."""
    at = int(outside.nonzero()[0, 0])
    return (
        f"the start lies outside the bounds in {int(outside.sum())} of its entries: entry {at} is {float(w[at])}, its "
        f"bounds are {float(box.lower[at])} and {float(box.upper[at])}. Start within them, for instance from "
        "start.clamp(lower, upper)."
    )


def _sides(bounds: Any, count: int) -> tuple[Any, Any]:
    """The lower and the upper bounds."""
    shape = tuple(getattr(bounds, "shape", ()))
    if shape == (2, 2) and count == 2:
        raise ValueError(
            "bounds are an array (2, 2), whose rows may be lower and upper bounds, or the pairs of two entries. Pass "
            "(lower, upper), or the pairs as bounds.tolist()."
        )
    if shape == (count, 2):
        bounds = bounds.tolist()
    try:
        return bounds.lb, bounds.ub
    except AttributeError:
        parts = list(bounds) if isinstance(bounds, (Sequence, Iterable)) else []
    pairs = [part for part in parts if isinstance(part, (list, tuple)) and len(part) == 2]
    if len(pairs) == len(parts) == count:
        return [low for low, _ in pairs], [high for _, high in pairs]
    if len(parts) == 2:
        return parts[0], parts[1]
    raise ValueError(
        f"bounds are one pair (lower, upper) for each of the {count} entries, or two arrays, tensors or numbers "
        f"(lower, upper), or an object with lb and ub as scipy.optimize.Bounds; got {bounds!r}."
    )
