"""Quasi-Newton steps between Newton steps, while they pay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from imstep.curvature.deferred import DeferredLinearisation
from imstep.globalization import Armijo, SearchState
from imstep.linalg import KrylovStatus
from imstep.optim.attempt import Attempt
from imstep.optim.direction import Direction
from imstep.optim.memory import Memory
from imstep.optim.preconditioning.quasi_newton import Secant
from imstep.optim.record import Cost, StepRecord
from imstep.optim.trials import try_steps


@dataclass(frozen=True)
class QuasiNewtonSteps:
    """Quasi-Newton steps between two Newton steps, as long as the loss falls faster for their price.

        d = -H g,   H by L-BFGS over the last steps of either kind

    A Newton step pays many products for a direction. Where its model holds nearby only, most of them are wasted, and
    many short steps at a gradient each come further. After a Newton step whose solve a disturbing direction has ended
    they follow as long as each lowers the loss by no less per gradient-equivalent than that did, and together they
    spend no more than it. Then the next Newton step judges them: if they did better, the next ones may spend twice as
    much; if not, they wait for a Newton step, and twice as many after each failure in a row.

    Only steps that go on where the last one ended, on the same function, can be such steps: those on the full batch.

    Args:
        pairs: how many steps H knows, >= 1: two vectors of memory for each, from the first disturbing direction on.
        always: whether they may follow any Newton step, and H learns from the start.
        trials: step lengths that are tried, >= 1.
        longest_wait: most Newton steps before they are tried again, >= 1.

    Cost: a gradient and a loss; at a failure they are lost.

    Source: Morales and Nocedal, Comput. Optim. Appl. 21 (2002), 143-154, who alternate L-BFGS and Newton-CG steps; when
        to go from one to the other is our choice.
    """

    pairs: int = 10
    always: bool = False
    trials: int = 3
    longest_wait: int = 8

    def __post_init__(self) -> None:
        if min(self.pairs, self.trials, self.longest_wait) < 1:
            raise ValueError(f"pairs, trials and longest_wait are at least 1, got {self}.")


class EnrichedAttempt(Attempt):
    """A Newton step, or in its place a quasi-Newton step where one is due and succeeds.

    Args:
        between: when there are quasi-Newton steps.
        secants: what is learnt from steps and changes of the gradient.
        *whole: the arguments of :class:`Attempt`.
    """

    def __init__(self, between: QuasiNewtonSteps, secants: Secant, *whole: Any) -> None:
        super().__init__(*whole)
        self._between, self._secants = between, secants

    def _run(self) -> tuple[StepRecord, Memory]:
        spent = Cost()
        if self._memory.between.due and self._pace.whole and self._part is None and not self._strategies.momentum:
            record, memory = self._quasi_newton()
            if record.quasi_newton:
                return record, memory
            spent, self._memory, self._deferred = record.cost, memory, None
            self._parameters.restore(self._snapshot)
        record, memory = super()._run()
        same = record.finite and self._goes_on(record.loss)
        fall, cost = record.loss - record.new_loss, record.cost.gradient_equivalents
        wanted = self._between.always or (record.status is not None and record.status.disturbing)
        longest = self._between.longest_wait
        between = self._memory.between.after_newton(fall, cost, same and record.accepted, wanted, longest)
        if record.finite and between.wanted:
            self._learn(same)
        memory = replace(memory, between=between)
        return replace(record, cost=record.cost + spent), memory

    def _quasi_newton(self) -> tuple[StepRecord, Memory]:
        """A step of H, which is no ``quasi_newton`` step where it fails."""
        self.point = self._deferred = DeferredLinearisation(self._frozen)
        self.loss, self.gradient = self.point.loss, self.point.gradient
        record, memory = replace(self._opened(Cost(gradients=1)), damping=0.0), self._memory
        failed = lambda record: (record, _after(memory, 0.0, record))
        norm = record.gradient_norm
        if not self._goes_on(record.loss) or memory.at_rest(norm, self._strategies.tolerance) or not norm < math.inf:
            return failed(record)
        self._learn(True)
        direction = self._direction()
        if not direction.descends(self.gradient):
            return failed(record)
        line = self._along(direction)
        longest = min(memory.reach, self._pace.longest) / direction.norm
        trials = try_steps(Armijo(), SearchState(), line, self._between.trials, longest)
        if not trials.accepted:
            return failed(replace(record, cost=record.cost + trials.cost))
        record = replace(self._finish(record, line.model, direction, trials, direction), quasi_newton=True)
        fall = record.loss - trials.loss
        memory = replace(
            memory.meet(record.gradient_norm),
            loss=trials.loss,
            failed=math.inf,
            full_steps=0,
            last_move=self._last_move(direction, trials),
            progress=fall / max(abs(record.loss), math.ulp(0.0)),
        )
        return record, _after(memory, fall, record)

    def _direction(self) -> Direction:
        """-H g, with H's own model: (A + 0) d = -g."""
        inverse = self._held(self._secants.operator(0.0))
        assert inverse is not None  # it has met a gradient
        start = Direction(self.gradient, self.gradient, 0.0, 0.0, 0.0, KrylovStatus.ENOUGH, 0)
        return start.moved(-(inverse @ self.gradient), -self.gradient, self.gradient)

    def _learn(self, same: bool) -> None:
        """From the last step, once."""
        if not same:
            self._secants.forget()
            self._secants.restart()
        self._secants.meet(self.origin, self.gradient)


def _after(memory: Memory, fall: float, record: StepRecord) -> Memory:
    between = memory.between.after_quasi_newton(fall, record.cost.gradient_equivalents)
    return replace(memory, between=between)
