"""What all steps have in common: parameters, buffers and random numbers that are kept or put back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from imstep.curvature.frozen import FrozenClosure, Linearisation
from imstep.curvature.hessian import hessian_of
from imstep.curvature.parameters import ParameterVector
from imstep.globalization import LineModel
from imstep.optim.direction import Direction, Escape, escape_direction
from imstep.optim.evaluable import failing_as
from imstep.optim.masked import masked
from imstep.optim.memory import Memory
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.trials import Trials, try_escape


class StepAttempt(ABC):
    """One step: everything between the first evaluation on a batch and the last.

    Args:
        memory: what the last step left.
        parameters: the vector that is moved.
        frozen: the closure on its batch.
    """

    def __init__(self, memory: Memory, parameters: ParameterVector, frozen: FrozenClosure) -> None:
        self._memory, self._parameters, self._frozen = memory, parameters, frozen
        self._snapshot = self._found = parameters.snapshot()
        self._keep = False
        self._mask: Tensor | None = None  # zeros for the entries that hooks hold fixed, (n,)

    @abstractmethod
    def run(self) -> tuple[StepRecord, Memory]:
        """The record of the step and what to remember."""

    @property
    @abstractmethod
    def start(self) -> tuple[Tensor, Tensor]:
        """Loss (0-dim, detached) and gradient (n,) before the step, once it has run."""

    @property
    def origin(self) -> Tensor:
        """Where the step began, (n,)."""
        return self._parameters.flatten(self._snapshot)

    @property
    def returned(self) -> Tensor | None:
        """What the closure returned first, 0-dim; None where that is no number."""
        return self._frozen.user.returned

    def _opened(self, cost: Cost, radius: float = math.nan) -> StepRecord:
        """The record of a step that has evaluated its start."""
        loss, gradient = self.start
        return StepRecord(
            step=self._memory.steps,
            outcome=StepOutcome.ACCEPTED,
            status=None,
            loss=float(loss),
            new_loss=float(loss),
            gradient_norm=float(gradient.norm()),
            radius=radius,
            cost=cost,
        )

    def _started(self, evaluate: Callable[[], StepRecord]) -> StepRecord:
        """The opened record; where the start is not finite, that of where the last step began, if it is finite there.

        No trial of a step looks at the gradient: the next step does so for nothing.
        """
        record = evaluate()
        previous = self._memory.previous
        if record.finite or previous is None or self._parameters.norm() != self._memory.size:
            return record
        here = self._parameters.get()
        self._parameters.set(previous)
        spent = record.cost + Cost(gradients=1)
        if not self._finite_here():
            self._parameters.restore(self._snapshot)
            return replace(record, cost=spent)
        self._memory = self._memory.retreated(float((here - previous).norm()))
        self._snapshot = self._parameters.snapshot()
        record = evaluate()
        return replace(record, went_back=True, cost=record.cost + spent)

    @failing_as(False)
    def _finite_here(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self._frozen.gradient())

    # --- along a direction --------------------------------------------------------------------------------------

    def _line(self, direction: Direction) -> LineModel:
        loss = self.start[0]
        roundoff = torch.finfo(loss.dtype).eps / 2
        return LineModel(float(loss), direction.slope, direction.curvature, direction.norm, roundoff)

    @failing_as(math.nan)
    def _loss_at(self, direction: Direction, step_length: float) -> float:
        self._parameters.move(self._snapshot, direction.vector, step_length)
        return float(self._frozen.loss())

    @failing_as((math.nan, math.nan))
    def _gradient_at(self, direction: Direction, step_length: float) -> tuple[float, float]:
        self._parameters.move(self._snapshot, direction.vector, step_length)
        loss, gradient = self._frozen.gradient()
        return float(loss), float(gradient @ direction.vector)

    def _finish(self, record: StepRecord, model: LineModel, direction: Direction, trials: Trials) -> StepRecord:
        self._keep = trials.accepted
        if trials.accepted:  # the last trial need not be the best
            self._parameters.move(self._snapshot, direction.vector, trials.step_length)
        return replace(
            record,
            outcome=StepOutcome.ACCEPTED if trials.accepted else StepOutcome.REJECTED,
            new_loss=trials.loss,
            trials=trials.count,
            step_length=trials.step_length,
            direction_norm=direction.norm,
            slope=direction.slope,
            curvature=direction.curvature,
            predicted_decrease=model.decrease(trials.step_length),
            actual_decrease=model.decrease(trials.step_length) - trials.taylor_error,
            rho=trials.rho,
            taylor_error=trials.taylor_error,
            cost=record.cost + trials.cost,
        )

    # --- at a stationary point ----------------------------------------------------------------------------------

    def _stationary(self, record: StepRecord, memory: Memory, point: Linearisation) -> tuple[StepRecord, Memory]:
        """At a stationary point: converged, unless there is a way out along negative curvature."""
        hessian = hessian_of(point, self._parameters)
        escape = escape_direction(masked(hessian, self._mask), point.gradient, seed=memory.steps)
        spent = Cost(hessian_products=hessian.products)
        return self._escape(replace(record, products=hessian.products, cost=record.cost + spent), memory, escape)

    def _escape(self, record: StepRecord, memory: Memory, escape: Escape | None) -> tuple[StepRecord, Memory]:
        """Leave, if the loss falls measurably: curvature whose promise drowns in rounding is none."""
        if escape is not None:
            direction, size = escape.direction, float(self._parameters.get().norm())
            if self._mask is not None:  # rounding may have left traces
                direction = replace(direction, vector=self._mask * direction.vector)
            model = self._line(direction)
            # What rounding makes of the loss where x is rounded comes on top of the rounding of the loss itself.
            blur = torch.finfo(self.start[0].dtype).eps * size
            least = model.rounding + blur * (record.gradient_norm + escape.largest * blur)
            length = max(size, math.sqrt(2 * abs(model.loss) / -model.curvature)) or 1.0
            length = min(length, memory.reach)
            trials = try_escape(memory.search, model, lambda t: self._loss_at(direction, t), length, 10 * least)
            record = self._finish(replace(record, status=direction.status), model, direction, trials)
            if trials.accepted:
                return record, replace(memory, full_steps=0)
        self._keep = True
        if escape is not None:
            self._parameters.restore(self._snapshot)
        return replace(record, outcome=StepOutcome.CONVERGED), memory

    # --- the end of a step --------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Put back what must not stay: after a rejected step everything, else what later evaluations did."""
        if not self._keep:
            self._parameters.restore(self._snapshot)
        self._frozen.leave(self._keep)

    def undo(self) -> None:
        """Put back everything, as if the step had not been tried."""
        self._parameters.restore(self._found)
        self._frozen.undo()
