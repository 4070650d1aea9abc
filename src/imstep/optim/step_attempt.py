"""What all steps have in common: parameters, buffers and random numbers that are kept or put back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector
from imstep.optim.memory import Memory
from imstep.optim.record import Cost, StepOutcome, StepRecord


class StepAttempt(ABC):
    """One step: everything between the first evaluation on a batch and the last.

    Args:
        memory: what the last step left.
        parameters: the vector that is moved.
        frozen: the closure on its batch.
    """

    def __init__(self, memory: Memory, parameters: ParameterVector, frozen: FrozenClosure) -> None:
        self._memory, self._parameters, self._frozen = memory, parameters, frozen
        self._snapshot = parameters.snapshot()
        self._keep = False

    @abstractmethod
    def run(self) -> tuple[StepRecord, Memory]:
        """The record of the step and what to remember."""

    @property
    @abstractmethod
    def start(self) -> tuple[Tensor, Tensor]:
        """Loss (0-dim, detached) and gradient (n,) before the step, once it has run."""

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

    def leave(self) -> None:
        """Put back what must not stay: after a rejected step everything, else what later evaluations did."""
        if not self._keep:
            self._parameters.restore(self._snapshot)
        self._frozen.leave(self._keep)

    def undo(self) -> None:
        """Put back everything, as if the step had not been tried."""
        self._parameters.restore(self._snapshot)
        self._frozen.undo()
