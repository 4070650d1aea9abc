"""How many points to draw for a step: more, where steps hold at their own points only."""

from __future__ import annotations

import math
from typing import Any

from imstep.optim.record import StepRecord


class GrowingPoints:
    """The number of points of the next step, where points are drawn anew for each.

        spread = loss at new points, before a step / loss at the points of the last step, after it

    Where steps hold elsewhere the spread is near 1. Where its geometric mean over ``window`` steps is above ``spread``,
    the number grows by ``factor``. Nothing is evaluated for that: both losses stand in the records of steps.

    Early steps, which are long and rough, need few points, and cost as much less. Late ones, whose damping is low, fit
    few points at the expense of all others.

    Args:
        count: points of the first steps, >= 1.
        largest: at which growth ends, >= count.
        spread: > 1.
        factor: > 1. A step on another number of points looks anew for what belongs to which residual, which costs it
            some passes: so let it be large.
        window: steps that one decision is made from, >= 1.

    Attributes:
        count: points for the next step.

    Raises:
        ValueError: a number is out of range.

    Cost: none.

    Source: our own; docs/redrawn-points.md says what it came to.

    Example:
        >>> import torch
        >>> from imstep import LeastSquares
        >>> _ = torch.manual_seed(0)
        >>> u = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
        >>> optimizer, points = LeastSquares(u.parameters()), GrowingPoints(10, largest=400)
        >>> for _ in range(40):
        ...     x = 6 * torch.rand(points.count, 1).double()
        ...     loss = optimizer.step(lambda: (u(x) - x.sin()).square().mean())
        ...     points.observe(optimizer.last_step)
        >>> points.count > 10
        True
    """

    def __init__(
        self, count: int, largest: int, *, spread: float = 1.4, factor: float = 2.0, window: int = 3
    ) -> None:
        if not 1 <= count <= largest:
            raise ValueError(f"points need 1 <= count <= largest, got {count} and {largest}.")
        if not (1 < spread < math.inf and 1 < factor < math.inf and window >= 1):
            raise ValueError(
                "spread and factor are more than 1, window at least 1, got "
                f"{spread}, {factor} and {window}."
            )
        self.count = count
        self._largest, self._spread, self._factor, self._window = largest, spread, factor, window
        self._last, self._sum, self._seen = math.nan, 0.0, 0

    def observe(self, record: StepRecord) -> None:
        """Take in the record of a step, and grow if it is time to."""
        self.observe_losses(record.loss, record.new_loss)

    def observe_losses(self, loss: float, new_loss: float) -> None:
        """Take in the losses of a step at its points, before and after it; those that are no positive numbers are
        passed over.
        """
        last, self._last = self._last, new_loss
        if not (0 < last < math.inf and 0 < loss < math.inf):
            return
        self._sum += math.log(loss / last)
        self._seen += 1
        if self._seen == self._window:
            if self._sum > self._window * math.log(self._spread):
                self.count = min(math.ceil(self._factor * self.count), self._largest)
            self._sum, self._seen = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to draw as many points: numbers."""
        return {"count": self.count, "last": self._last, "sum": self._sum, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; arguments are those given to the constructor."""
        self.count, self._last = state["count"], state["last"]
        self._sum, self._seen = state["sum"], state["seen"]
