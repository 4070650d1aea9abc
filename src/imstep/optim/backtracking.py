"""Which of a Krylov solver's iterates becomes the direction of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from imstep.optim.direction import Direction
from imstep.optim.record import Cost


@dataclass(frozen=True)
class IterateBacktracking:
    """From the last iterate back over stored ones, as long as the loss at w + x falls.

    Later iterates minimise the model further, and may trust it too far: early ones have moved along the directions of
    most curvature only. Iterates are stored at numbers ⌈growth^j⌉, so that there are few.

    Args:
        growth: > 1.

    Raises:
        ValueError: it is out of range.

    Cost: two vectors of memory for each stored iterate; a loss for the last and for each that is tried. Where parameter
        groups have different learning rates the last iterate is taken.

    Source: Martens, ICML 2010, section 4.6; Martens and Sutskever, ICML 2011, with growth 1.3.
    """

    growth: float = 1.3

    def __post_init__(self) -> None:
        if not 1 < self.growth < math.inf:
            raise ValueError(f"growth, of the intervals between stored iterates, is above 1, got {self.growth}.")

    def best(self, last: Direction, gradient: Tensor, loss_at: Callable[[Direction], float]) -> tuple[Direction, Cost]:
        """The iterate to take, and what finding it cost."""
        if not last.earlier:
            return last, Cost()
        best, lowest, tried = last, _finite(loss_at(last)), 1
        for vector, image in reversed(last.earlier):
            iterate = last.moved(vector, image, gradient)
            if not iterate.descends(gradient):  # from a warm start it need not
                break
            loss, tried = _finite(loss_at(iterate)), tried + 1
            if not loss < lowest and not math.isinf(lowest):
                break
            best, lowest = iterate, loss
        return best, Cost(losses=tried)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
