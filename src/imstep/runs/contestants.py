"""Who takes part in a comparison, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imstep.runs.optimizers import OptimizerSpec, get_optimizer
from imstep.runs.rows import TrainingError

__all__ = ["DEFAULT_OPTIMIZERS", "RIVALS", "Contestant", "contestants"]

MINIBATCH = 150
"""Examples a step of the second run of optimizers with rates to sweep."""

RIVALS = ("adam", "lbfgs")
DEFAULT_OPTIMIZERS = ("newton-krylov", *RIVALS)


@dataclass(frozen=True)
class Contestant:
    """An optimizer in a comparison.

    Args:
        spec: the optimizer.
        batch_size: examples a step; None for the full batch.
        options: what differs from the optimizer's defaults.
        learning_rates: rates to choose from by a sweep; empty to take the options as they are.

    Raises:
        TrainingError: learning rates for an optimizer that has none.
    """

    spec: OptimizerSpec
    batch_size: int | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.learning_rates and "lr" not in self.spec.defaults:
            raise TrainingError(f"{self.spec.name} has no learning rate to sweep: leave learning_rates out.")

    @property
    def title(self) -> str:
        """For tables: the optimizer, and the batch size if it is not the full batch."""
        return self.spec.title if self.batch_size is None else f"{self.spec.title}, batch {self.batch_size}"

    @property
    def name(self) -> str:
        """For progress: as the command line calls it, with the batch size if it is not the full batch."""
        return self.spec.name if self.batch_size is None else f"{self.spec.name}, batch {self.batch_size}"

    def candidates(self) -> list[dict[str, float]]:
        """The settings to try, at least one."""
        return [{**self.options, "lr": rate} for rate in self.learning_rates] or [dict(self.options)]

    def label(self, options: Mapping[str, Any]) -> str:
        """The title with the learning rate, where that was chosen by a sweep."""
        return f"{self.title}, lr {options['lr']:g}" if self.learning_rates else self.title


def contestants(
    names: Sequence[str] = DEFAULT_OPTIMIZERS, *, batch_size: int | None = None, minibatch: int | None = MINIBATCH
) -> list[Contestant]:
    """Contestants by name, the subject first; rates to sweep are each optimizer's own.

    Args:
        names: registered optimizers.
        batch_size: examples a step for all; None for the full batch.
        minibatch: with the full batch for all, optimizers with rates to sweep run a second time with so many
            examples a step: their usual use, and better per gradient-equivalent; those for mini-batches only so. None
            leaves that out.

    Raises:
        OptimizerError: an unknown name.
        TrainingError: no name, or one given twice.
    """
    if not names:
        raise TrainingError("a comparison needs at least one optimizer.")
    if len(set(names)) != len(names):
        raise TrainingError(f"an optimizer is named twice in {', '.join(names)}: name each once.")
    found = []
    for name in names:
        spec = get_optimizer(name)
        size = minibatch if batch_size is None and spec.mini_batches else batch_size
        found.append(Contestant(spec, size, learning_rates=tuple(spec.learning_rates)))
        if batch_size is None and minibatch is not None and spec.learning_rates:
            found.append(Contestant(spec, minibatch, learning_rates=tuple(spec.learning_rates)))
    return found
