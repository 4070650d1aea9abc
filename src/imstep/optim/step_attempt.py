"""What all steps have in common: parameters, buffers and random numbers that are kept or put back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from imstep.curvature.held import free_entries
from imstep.curvature.hessian import hessian_of
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import FrozenBatch, Linearised
from imstep.globalization import Armijo, LineModel, StepSearch
from imstep.linalg.dots import dots, norm_in_range
from imstep.linalg.precision import coarsest_eps
from imstep.optim.direction import Direction, Escape, escape_direction
from imstep.optim.evaluable import failing_as
from imstep.optim.masked import masked
from imstep.optim.memory import Memory
from imstep.optim.pace import Pace, shortened
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.trials import Line, Trials, try_escape

MOST_HALVINGS = 12
"""Of what the learning rates leave of a step, until it is given up."""


class StepAttempt(ABC):
    """One step: everything between the first evaluation on a batch and the last.

    Args:
        memory: what the last step left.
        parameters: the vector that is moved.
        frozen: the closure on its batch.
        pace: how much of the step is taken; all of it if left out.
    """

    def __init__(
        self, memory: Memory, parameters: ParameterVector, frozen: FrozenBatch, pace: Pace | None = None
    ) -> None:
        self._memory, self._parameters, self._frozen, self._pace = memory, parameters, frozen, pace or Pace()
        self._snapshot = self._found = parameters.snapshot()
        self._keep = False
        self._mask: Tensor | None = None  # zeros for the entries that are held fixed, (n,)

    @abstractmethod
    def run(self) -> tuple[StepRecord, Memory]:
        """The record of the step and what to remember."""

    @property
    @abstractmethod
    def start(self) -> tuple[Tensor, Tensor]:
        """Loss (0-dim, detached) and gradient (n,) before the step, once it has run."""

    def doubt(self) -> None:
        """Let the closure be called once more at the start, and raise where it is another function then."""
        self._frozen.doubt()

    @property
    def compared(self) -> int:
        """Evaluations that this took."""
        return self._frozen.compared

    @property
    def of_closure(self) -> tuple[Tensor, Tensor]:
        """As :attr:`start`, of the closure's loss alone, without the penalty."""
        loss, gradient = self.start
        penalty = self._frozen.penalty
        if penalty is None:
            return loss, gradient
        return loss - penalty.value(self.origin), torch.addcmul(gradient, penalty.factors, self.origin, value=-1)

    def penalty_now(self) -> float:
        """What is added to the closure's loss where the parameters are."""
        penalty = self._frozen.penalty
        return 0.0 if penalty is None else penalty.value(self._parameters.get())

    @property
    def origin(self) -> Tensor:
        """Where the step began, (n,)."""
        return self._parameters.flatten(self._snapshot)

    @property
    def returned(self) -> Tensor | None:
        """What the closure returned first, 0-dim; None where that is no number."""
        return self._frozen.returned

    def _opened(self, cost: Cost, radius: float = math.nan) -> StepRecord:
        """The record of a step that has evaluated its start."""
        self._mask = free_entries(self._frozen, self._parameters)
        self._memory = self._memory.within(self._mask)
        loss, gradient = self.start
        value = float(loss)
        return StepRecord(
            step=self._memory.steps,
            outcome=StepOutcome.ACCEPTED,
            status=None,
            loss=value,
            new_loss=value,
            gradient_norm=norm_in_range(gradient),
            penalty=self.penalty_now(),
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

    def _not_finite(self, record: StepRecord) -> tuple[StepRecord, Memory]:
        """A step that ends where it has begun, since loss or gradient are not finite there."""
        memory = replace(self._memory, refusals=self._memory.refusals + 1)
        return replace(record, outcome=StepOutcome.NON_FINITE), memory

    @failing_as(False)
    def _finite_here(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self._frozen.gradient())

    # --- along a direction --------------------------------------------------------------------------------------

    def _within(self, direction: Direction) -> Direction:
        """It, without what rounding has left of the entries that are held fixed."""
        return direction if self._mask is None else replace(direction, vector=self._mask * direction.vector)

    def _line(self, direction: Direction) -> LineModel:
        loss = self.start[0]
        roundoff = coarsest_eps([loss, *self._parameters.tensors]) / 2
        return LineModel(float(loss), direction.slope, direction.curvature, direction.norm, roundoff)

    @failing_as(math.nan)
    def _loss_at(self, direction: Direction, step_length: float) -> float:
        self._parameters.move(self._snapshot, direction.vector, step_length)
        return float(self._frozen.loss())

    @failing_as((math.nan, math.nan))
    def _gradient_at(self, direction: Direction, step_length: float) -> tuple[float, float]:
        self._parameters.move(self._snapshot, direction.vector, step_length)
        loss, gradient = self._frozen.gradient()
        (slope,) = dots((gradient, direction.vector))
        return float(loss), slope

    def _along(self, direction: Direction) -> Line:
        return Line(
            self._line(direction), lambda t: self._loss_at(direction, t), lambda t: self._gradient_at(direction, t)
        )

    def _taken(self, search: StepSearch, taken: Direction, trials: Trials) -> tuple[Direction, Trials]:
        """What of the accepted step is taken, given what the learning rates leave of it."""
        if self._pace.whole or not trials.accepted:
            return taken, trials
        if taken.norm == 0:
            return taken, replace(trials, loss=float(self.start[0]))
        return shortened(search, self._memory.search, self._along(taken), taken, trials, MOST_HALVINGS)

    def _finish(
        self, record: StepRecord, model: LineModel, direction: Direction, trials: Trials, taken: Direction
    ) -> StepRecord:
        self._keep = trials.accepted
        if trials.accepted:  # the last trial need not be the best
            self._parameters.move(self._snapshot, taken.vector, trials.step_length)
        return replace(
            record,
            outcome=StepOutcome.ACCEPTED if trials.accepted else StepOutcome.REJECTED,
            new_loss=trials.loss,
            trials=trials.count,
            step_length=trials.step_length,
            direction_norm=direction.norm,
            step_norm=trials.step_length * taken.norm if trials.accepted else 0.0,
            slope=direction.slope,
            curvature=direction.curvature,
            predicted_decrease=model.decrease(trials.step_length),
            actual_decrease=model.decrease(trials.step_length) - trials.taylor_error,
            rho=trials.rho,
            taylor_error=trials.taylor_error,
            cost=record.cost + trials.cost,
        )

    # --- at a stationary point ----------------------------------------------------------------------------------

    def _stationary(self, record: StepRecord, memory: Memory, point: Linearised) -> tuple[StepRecord, Memory]:
        """At a stationary point: converged, unless there is a way out along negative curvature."""
        hessian = hessian_of(point, self._parameters)
        escape = escape_direction(masked(hessian, self._mask), point.gradient, seed=memory.steps)
        spent = Cost(hessian_products=hessian.products)
        return self._escape(replace(record, products=hessian.products, cost=record.cost + spent), memory, escape)

    def _escape(self, record: StepRecord, memory: Memory, escape: Escape | None) -> tuple[StepRecord, Memory]:
        """Leave, if the loss falls measurably: curvature whose promise drowns in rounding is none."""
        if escape is not None:
            direction, x = self._within(escape.direction), self._parameters.get().double()
            size = float(x.norm())
            model = self._line(direction)
            # What rounding makes of the loss where x is rounded comes on top of the rounding of the loss itself.
            eps, slope = torch.finfo(self.start[0].dtype).eps, float(self.start[1].double().abs() @ x.abs())
            least = model.rounding + eps * (slope + escape.largest * eps * size**2)
            length = max(size, math.sqrt(2 * abs(model.loss) / -model.curvature) or 1.0)
            share = self._pace.share(direction.vector)
            taken = direction if self._pace.whole else direction.moved(share, torch.zeros_like(share), self.start[1])
            length = min(length, memory.reach, self._pace.longest / taken.norm if taken.norm > 0 else math.inf)
            trials = try_escape(memory.search, model, lambda t: self._loss_at(direction, t), length, 10 * least)
            taken, trials = self._taken(Armijo(), taken, trials)
            record = self._finish(replace(record, status=direction.status), model, direction, trials, taken)
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
