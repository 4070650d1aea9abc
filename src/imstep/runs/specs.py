"""What can be said of an optimizer before there is one: its name, its options, what it is meant for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from imstep.runs.passing import OptimizerError
from imstep.runs.steppers import Stepper
from imstep.tasks import Problem

__all__ = ["OptimizerSpec"]


@dataclass(frozen=True)
class OptimizerSpec:
    """A named optimizer and the options it takes.

    Args:
        name: what the command line calls it.
        title: for tables and legends.
        description: one sentence.
        make: `make(problem, options)` -> Stepper; `options` has every key of `defaults`.
        defaults: the options and their values when not given.
        learning_rates: what a sweep tries; empty if there is nothing to tune.
        full_batch: whether it is meant for the full batch when no batch size is asked for.
        mini_batches: whether it is meant for mini-batches, and has some in comparisons on the full batch.
    """

    name: str
    title: str
    description: str
    make: Callable[[Problem, Mapping[str, float]], Stepper]
    defaults: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    full_batch: bool = False
    mini_batches: bool = False

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

    def create(self, problem: Problem, **options: float) -> Stepper:
        """A fresh optimizer of the problem's parameters.

        Raises:
            OptimizerError: an unknown option, or a value that the optimizer refuses.
        """
        resolved = self.resolve(options)
        try:
            return self.make(problem, resolved)
        except ValueError as error:
            raise OptimizerError(f"{self.name} refuses {resolved}: {error}") from error
