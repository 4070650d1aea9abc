"""The plain records of a training run: when it ends, what it used, what each step and evaluation said."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "Clock",
    "CurvatureRow",
    "Ending",
    "EvaluationRow",
    "Limits",
    "LogRow",
    "Row",
    "Schedule",
    "StepRow",
    "Totals",
    "TrainingError",
    "present_status",
]


class TrainingError(ValueError):
    """A run was asked for that cannot be made; the message says what to change."""


class Ending(enum.Enum):
    """Why a run ended; the value is the sentence to show."""

    EPOCHS = "all epochs done"
    BUDGET = "budget of gradient-equivalents spent"
    SECONDS = "time limit reached"
    CONVERGED = "converged: the gradient is at its tolerance"
    DIVERGED = "diverged: the loss was not finite several steps in a row"

    @property
    def message(self) -> str:
        """The sentence to show."""
        return self.value


class Clock(enum.Enum):
    """What an evaluation schedule counts."""

    EPOCHS = "epochs"
    COST = "gradient-equivalents"
    SECONDS = "seconds"


@dataclass(frozen=True)
class Schedule:
    """Evaluate before the first step, then every `every` units of `clock`, and at the end.

    Raises:
        TrainingError: `every` is not above zero, or infinite.
    """

    every: float = 1.0
    clock: Clock = Clock.EPOCHS

    def __post_init__(self) -> None:
        if not 0 < self.every < math.inf:
            raise TrainingError(f"evaluation every {self.every} {self.clock.value}: give a number above 0.")


@dataclass(frozen=True)
class Limits:
    """When to stop: at the first limit reached. The step that crosses `budget` or `seconds` is finished.

    Raises:
        TrainingError: no limit at all, or one that is not above zero, or infinite.
    """

    epochs: float | None = None
    budget: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if not given:
            raise TrainingError("a run without a limit never ends: give epochs, budget or seconds.")
        for name, value in given.items():
            if not 0 < value < math.inf:
                raise TrainingError(f"{name}={value}: give a number above 0.")


@dataclass(frozen=True)
class Totals:
    """What a run has used so far.

    `cost` is in gradient-equivalents of the *whole training set*: a forward and backward pass over a batch
    counts as the share of the training set that the batch is, so runs with different batch sizes compare.
    Evaluations are not charged to it; they are listed beside it.
    """

    steps: int = 0
    cost: float = 0.0
    gradients: int = 0
    products: int = 0
    losses: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    evaluation_cost: float = 0.0
    evaluation_seconds: float = 0.0
    statuses: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRow:
    """One step: `loss` is the batch's at its start; `epoch`, `cost`, `seconds` are totals at its end."""

    step: int
    epoch: float
    loss: float
    cost: float
    step_cost: float
    seconds: float
    new_loss: float | None = None
    status: str | None = None
    record: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, `kind` first."""
        return {"kind": "step", **asdict(self)}


@dataclass(frozen=True)
class EvaluationRow:
    """Mean losses over the whole training set and the held-out set after `step` steps."""

    step: int
    epoch: float
    cost: float
    seconds: float
    train_loss: float
    heldout_loss: float
    train_metric: float | None = None
    heldout_metric: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, `kind` first."""
        return {"kind": "evaluation", **asdict(self)}


@dataclass(frozen=True)
class CurvatureRow:
    """The Hessian of the mean training loss after `step` steps.

    `density` has grid, values, error and width; `edge` is the largest eigenvalue at which the optimizer is stable, None
    where there is no such number.
    """

    step: int
    epoch: float
    cost: float
    seconds: float
    largest: float
    residual_norm: float
    trace: float
    trace_error: float
    density: Mapping[str, Any]
    edge: float | None
    products: int
    measuring_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, `kind` first."""
        return {"kind": "curvature", **asdict(self)}


Row = StepRow | EvaluationRow
LogRow = Row | CurvatureRow
"""What a run's log holds."""

_FORMER_STATUSES = {"stalled": "enough"}


def present_status(name: Any) -> Any:
    """How a status is called now that a saved run may call as earlier versions did.

    >>> present_status("stalled"), present_status("converged")
    ('enough', 'converged')
    """
    return _FORMER_STATUSES.get(name, name)
