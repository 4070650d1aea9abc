"""Averages of the iterates, where the noise of batches averages out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from imstep.curvature.parameters import ParameterVector


class Averaging(ABC):
    """A kind of running average."""

    @abstractmethod
    def share(self, count: int) -> float:
        """How much iterate number ``count``, from 1 on, counts in the average with those before; 1 for the first."""


@dataclass(frozen=True)
class ExponentialAverage(Averaging):
    """An average over about the last 1 / (1 - decay) steps, in which older ones count ever less; the first ones evenly.

        w̄ <- w̄ + (w - w̄) / min(k, 1 / (1 - decay))   after step k

    Args:
        decay: weight of the past, in [0, 1).

    Source: the default is what ``benchmarks/minibatch`` and ``benchmarks/small_problems`` measure.

    Example:
        >>> [round(ExponentialAverage(0.75).share(k), 2) for k in (1, 2, 4, 100)]
        [1.0, 0.5, 0.25, 0.25]
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay, the weight of the past, must lie in [0, 1), got {self.decay}.")

    def share(self, count: int) -> float:
        return max(1 - self.decay, 1 / count)


@dataclass(frozen=True)
class TailAverage(Averaging):
    """An average over a share of all steps: chiefly the last 1 / (power + 1) of them, whatever their number.

        w̄ <- w̄ + (w - w̄) (power + 1) / (k + power)   after step k

    Args:
        power: step k counts about k to this power, >= 0; 0 for the plain mean of all iterates.

    Source: Shamir and Zhang, ICML 2013 (arXiv 1212.1824), section 4; their power.

    Example:
        >>> [round(TailAverage().share(k), 2) for k in (1, 2, 97)]
        [1.0, 0.8, 0.04]
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.power < float("inf"):
            raise ValueError(f"power, by which steps count, is finite and at least 0, got {self.power}.")

    def share(self, count: int) -> float:
        return (self.power + 1) / (count + self.power)


class Average:
    """The average of an optimizer's iterates.

    Args:
        kind: how they are averaged.

    Attributes:
        shown: whether the parameters are the average now.
    """

    def __init__(self, kind: Averaging) -> None:
        if not isinstance(kind, Averaging):
            raise TypeError(f"average must be an Averaging, got {kind!r}. Pass ExponentialAverage(), or leave it out.")
        self._kind, self.shown = kind, False
        self.forget()

    def forget(self) -> None:
        """Begin anew, on other parameters."""
        self._count = 0
        self._value: Tensor | None = None

    def take(self, parameters: ParameterVector) -> None:
        """Take in what the parameters are now."""
        self._count += 1
        now, share = parameters.get(), self._kind.share(self._count)
        self._value = now if self._value is None else self._value.lerp(now, share)

    @contextmanager
    def swapped(self, parameters: ParameterVector, model: nn.Module | None) -> Iterator[None]:
        """The parameters are the average inside, and afterwards what they were, like the buffers of ``model``."""
        if self.shown:
            raise RuntimeError("the parameters are the average already. Leave the other context first.")
        before = parameters.snapshot()
        buffers = [] if model is None else [(buffer, buffer.clone()) for buffer in model.buffers()]
        self.shown = True
        try:
            if self._value is not None:
                parameters.restore(parameters.unflatten(self._value))
            yield
        finally:
            self.shown = False
            parameters.restore(before)
            for buffer, saved in buffers:
                buffer.copy_(saved)

    def state_dict(self) -> dict[str, Any]:
        """How many iterates it is of, and their average."""
        return {"count": self._count, "value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._count, self._value = state["count"], state["value"]
