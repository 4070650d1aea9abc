"""Steps with a fixed rate, which ask nothing of the loss where they end."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.hooks import mask_of
from imstep.optim.record import StepOutcome, StepRecord
from imstep.optim.step_attempt import StepAttempt


class FixedRateAttempt(StepAttempt):
    """A step of a method with a fixed rate; :meth:`run` sets ``_at``, loss and gradient at its start."""

    _frozen: FrozenClosure
    _at: tuple[Tensor, Tensor]

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        return self._at

    def _moved(self, record: StepRecord, step: Tensor) -> StepRecord:
        """Go against ``step`` as far as learning rates say."""
        taken = -self._pace.share(step)
        factors = self._frozen.hook_factors
        if factors is not None and (mask := mask_of(factors)) is not None:
            taken = mask * taken
        norm = float(taken.norm())
        if not math.isfinite(norm):
            return replace(record, outcome=StepOutcome.REJECTED)
        share = min(1.0, self._pace.longest / norm) if norm > 0 else 1.0
        self._parameters.move(self._snapshot, taken, share)
        self._keep = True
        slope = float(self._at[1] @ taken)
        return replace(
            record, new_loss=math.nan, step_length=share, direction_norm=norm, step_norm=share * norm, slope=slope
        )
