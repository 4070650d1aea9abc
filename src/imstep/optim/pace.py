"""How much of an accepted step is taken: learning rates, and a bound on its length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.globalization import Reason, SearchState, StepSearch
from imstep.optim.direction import Direction
from imstep.optim.trials import Line, Trials


@dataclass(frozen=True, eq=False)
class Pace:
    """What is taken of a step d that a method has found good: D d, at most ``longest`` long, D being diagonal.

    Attributes:
        lr: the largest entry of D.
        rates: D (n,), where groups of parameters differ; None where they do not.
        longest: bound on the length of what is taken, > 0.
    """

    lr: float = 1.0
    rates: Tensor | None = None
    longest: float = math.inf

    @classmethod
    def of(cls, rates: Sequence[float], parameters: ParameterVector, longest: float) -> Pace:
        """From the learning rate of each parameter."""
        alike = all(rate == rates[0] for rate in rates)
        return cls(max(rates), None if alike else parameters.spread(rates), longest)

    @property
    def whole(self) -> bool:
        """Whether a step is taken as it is, but for its length."""
        return self.lr == 1 and self.rates is None

    def share(self, vector: Tensor) -> Tensor:
        """D d, (n,)."""
        return self.lr * vector if self.rates is None else self.rates.to(vector.dtype) * vector

    def steepest(self, gradient: Tensor) -> Tensor:
        """-D g without D's largest entry, a direction of descent whatever D is."""
        return -self.share(gradient) / self.lr


def shortened(
    search: StepSearch, state: SearchState, line: Line, taken: Direction, trials: Trials, limit: int
) -> tuple[Direction, Trials]:
    """What is taken of an accepted step, halved until the loss there is one that the search would not refuse.

    Args:
        search, state: as they were when the step was searched for.
        line: the loss along ``taken``.
        taken: D d for the direction d that was searched along.
        trials: along d; the last one was accepted.
        limit: halvings at most.

    Returns:
        What is taken, such that the step length is that of the trials still; and the trials with the loss there.
    """
    step_length, cost = trials.step_length, trials.cost
    for count in range(1, limit + 1):
        trial, spent = line.evaluate(step_length, search.needs_slopes)
        cost += spent
        verdict = search.judge(state, line.model, trial)
        if verdict.accepted or verdict.reason is Reason.STEEP:  # a part of a step need not spend the slope
            kept = taken.times(step_length / trials.step_length)
            return kept, replace(trials, loss=trial.loss, count=trials.count + count, cost=cost)
        step_length /= 2
    return taken, replace(trials, accepted=False, loss=line.model.loss, count=trials.count + limit, cost=cost)


def option_of(group: dict[str, Any], name: str) -> float:
    """A number of a parameter group that is finite and at least 0.

    Raises:
        ValueError: it is not.
    """
    value = group[name]
    single = not isinstance(value, torch.Tensor) or (value.numel() == 1 and not value.is_complex())
    try:
        number = float(value) if single else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(
            f"{name} of a parameter group is a finite number of at least 0, or a tensor with one entry, got {value!r}. "
            f"Look at what sets it: the constructor, the group, or a scheduler that writes group[{name!r}]."
        )
    return number


def options_of(groups: Iterable[dict[str, Any]], name: str, parameters: ParameterVector) -> list[float]:
    """The number of its group for each parameter, in order."""
    found = {id(p): number for group in groups for number in [option_of(group, name)] for p in group["params"]}
    return [found[id(p)] for p in parameters.tensors]
