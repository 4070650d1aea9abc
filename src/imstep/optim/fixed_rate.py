"""Steps with a fixed rate, which ask nothing of the loss where they end."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.fully_sharded import refuse_sharded
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.penalty import Penalty
from imstep.curvature.processes import Processes
from imstep.curvature.shared import SharedBatch
from imstep.globalization import SearchState
from imstep.optim.averaging import Averaging
from imstep.optim.memory import Memory
from imstep.optim.pace import options_of
from imstep.optim.record import StepOutcome, StepRecord
from imstep.optim.step_attempt import StepAttempt
from imstep.optim.stepwise import StepwiseOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FixedRateOptimizer(StepwiseOptimizer):
    """The shell around steps with a fixed rate; weight decay is apart from the loss.

    Args:
        params, lr, weight_decay, max_step_norm, max_refusals, average, process_group: as of the optimizers.

    Raises:
        ValueError: parameters are sharded over processes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor,
        weight_decay: float,
        max_step_norm: float | None,
        max_refusals: int,
        average: Averaging | None,
        process_group: ProcessGroup | None,
    ) -> None:
        self._processes = Processes.of(process_group)
        super().__init__(
            params,
            Memory(search=SearchState(), damping=0.0),
            options={"lr": lr, "weight_decay": weight_decay},
            max_step_norm=max_step_norm,
            max_refusals=max_refusals,
            average=average,
        )
        refuse_sharded(self._parameters.tensors)
        self._means = self._begun(self._parameters)

    @abstractmethod
    def _begun(self, parameters: ParameterVector) -> Any:
        """The means before the first step."""

    def _decay(self) -> Tensor:
        """λ, entry by entry (n,)."""
        return self._parameters.spread(options_of(self.param_groups, "weight_decay", self._parameters))

    def _penalty(self) -> Penalty | None:
        return None  # decay is apart from the loss

    def _parts(self) -> dict[str, Any]:
        return {"means": self._means.state_dict()}

    def _load_parts(self, parts: dict[str, Any]) -> None:
        self._means.load_state_dict(parts["means"])

    def _adopt(self, parameters: ParameterVector) -> None:
        super()._adopt(parameters)
        self._means = self._begun(parameters)


class FixedRateAttempt(StepAttempt):
    """A step of a method with a fixed rate; :meth:`run` sets ``_at``, loss and gradient at its start."""

    _frozen: FrozenClosure | SharedBatch
    _at: tuple[Tensor, Tensor]

    def doubt(self) -> None:
        """No: a step is one evaluation, and the closure may have another batch in each."""

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        return self._at

    def _moved(self, record: StepRecord, step: Tensor) -> StepRecord:
        """Go against ``step`` as far as learning rates say."""
        taken = -self._pace.share(step)
        if self._mask is not None:
            taken = self._mask * taken
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
