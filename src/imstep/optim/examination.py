"""Looking at a point without taking a step: is it a minimum?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.globalization import Armijo
from imstep.optim.box import Box
from imstep.optim.direction import Direction
from imstep.optim.memory import Memory
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.stationarity import Stationarity, stationarity_at
from imstep.optim.step_attempt import StepAttempt
from imstep.optim.trials import try_steps

NEWTON_TRIALS = 6
"""Step lengths tried along Newton's step at a point that is no minimum."""


class Examination(StepAttempt):
    """Measures how far a point is from a minimum; leaves it along negative curvature if it is stationary otherwise.

    The record's outcome is CONVERGED at a minimum, ACCEPTED where the point was left, NON_FINITE where nothing can be
    said, and else REJECTED.

    Args:
        memory, parameters, frozen: see :class:`StepAttempt`.
        stationary: says whether a point counts as stationary, from the loss and what was measured.
        typical: see :func:`stationarity_at`.
        may_leave: whether the point may be left; else a saddle counts as not stationary.
        box: bounds; entries that they hold back are left out of all measures.
        newton: whether Newton's step is taken where the point is no minimum, as far as the loss falls along it.

    Attributes:
        found: what was measured; None where loss or gradient is not finite.
    """

    _frozen: FrozenClosure

    def __init__(
        self,
        memory: Memory,
        parameters: ParameterVector,
        frozen: FrozenClosure,
        stationary: Callable[[float, Stationarity], bool],
        typical: Tensor | None,
        may_leave: bool,
        box: Box | None = None,
        newton: bool = False,
    ) -> None:
        super().__init__(memory, parameters, frozen)
        self._stationary_by, self._typical, self._may_leave = stationary, typical, may_leave
        self._box, self._takes_newton = box, newton and may_leave and box is None
        self.found: Stationarity | None = None

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        return self._point.loss, self._point.gradient

    def run(self) -> tuple[StepRecord, Memory]:
        self._point = self._frozen.linearise()
        record, memory = self._opened(Cost(linearisations=1)), self._memory
        if not record.finite:
            return replace(record, outcome=StepOutcome.NON_FINITE), memory
        self.found = stationarity_at(
            self._point, self._parameters, self._typical, self._held(), seed=memory.steps
        )
        spent = Cost(hessian_products=self.found.products)
        record = replace(record, products=self.found.products, cost=record.cost + spent)
        if not self._stationary_by(record.loss, self.found) or (self.found.escape and not self._may_leave):
            return self._newton(record, memory, self.found.newton)
        return self._escape(record, memory, self.found.escape)

    def _newton(self, record: StepRecord, memory: Memory, direction: Direction | None) -> tuple[StepRecord, Memory]:
        """No minimum: take Newton's step, which is known now, as far as the loss falls along it."""
        record = replace(record, outcome=StepOutcome.REJECTED)
        usable = direction is not None and direction.slope < 0 and math.isfinite(direction.norm + direction.curvature)
        if direction is None or not usable or not self._takes_newton:
            return record, memory
        model = self._line(direction)
        search = Armijo()
        longest = memory.reach / direction.norm
        trials = try_steps(search, search.initial(), self._along(direction), NEWTON_TRIALS, longest)
        if trials.accepted:
            record = replace(record, status=direction.status)
            return self._finish(record, model, direction, trials, direction), memory
        return replace(record, cost=record.cost + trials.cost), memory

    def _held(self) -> Tensor | None:
        """Which entries (n,) bounds hold back."""
        return None if self._box is None else self._box.held(self._point.gradient, self._parameters.get())
