"""What can be said of an optimizer before there is one: its name, its options, what it is meant for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imstep.runs.passing import OptimizerError
from imstep.runs.steppers import Stepper
from imstep.tasks import Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["OptimizerSpec"]


@dataclass(frozen=True)
class OptimizerSpec:
    """A named optimizer and the options it takes.

    Args:
        name: what the command line calls it.
        title: for tables and legends.
        description: one sentence.
        make: `make(problem, options)` -> Stepper; `options` has every key of `defaults`. Where `several`, it also takes
            a `process_group`.
        defaults: the options and their values when not given.
        learning_rates: what a sweep tries; empty if there is nothing to tune.
        full_batch: whether it is meant for the full batch when no batch size is asked for.
        mini_batches: whether it is meant for mini-batches, and has some in comparisons on the full batch.
        several: whether it trains over several processes.
    """

    name: str
    title: str
    description: str
    make: Callable[..., Stepper]
    defaults: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    full_batch: bool = False
    mini_batches: bool = False
    several: bool = False

    def resolve(self, options: Mapping[str, float] | None = None) -> dict[str, float]:
        """`defaults` overridden by `options`.

        Raises:
            OptimizerError: an option that this optimizer does not have.
        """
        given = dict(options or {})
        unknown = [key for key in given if key not in self.defaults]
        if unknown:
            known = ", ".join(f"{key}={value:g}" for key, value in self.defaults.items()) or "none"
            raise OptimizerError(f"{self.name} has no option {unknown[0]!r}. Its options: {known}.")
        return {**self.defaults, **given}

    def create(self, problem: Problem, process_group: ProcessGroup | None = None, /, **options: float) -> Stepper:
        """A fresh optimizer of the problem's parameters; of those of all processes of a group.

        Raises:
            OptimizerError: an unknown option, or a value that the optimizer refuses.
        """
        resolved, more = self.resolve(options), {}
        if process_group is not None:
            if not self.several:
                raise OptimizerError(
                    f"{self.name} trains in one process, and torchrun has started several. Take newton-krylov, "
                    "newton-krylov-batches or least-squares, which share out each batch; or start it without torchrun."
                )
            more["process_group"] = process_group
        try:
            return self.make(problem, resolved, **more)
        except ValueError as error:
            raise OptimizerError(f"{self.name} refuses {resolved}: {error}") from error
