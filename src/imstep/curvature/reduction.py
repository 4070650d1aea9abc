"""How the losses of batches make up the loss of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


class Reduction(ABC):
    """How much each batch counts in the whole."""

    @property
    def guessed(self) -> bool:
        """Whether weights are read off batches, and not told."""
        return False

    @abstractmethod
    def weight(self, batch: Any) -> float:
        """How much ``batch`` counts, before scaling."""

    @abstractmethod
    def scale(self, total: float) -> float:
        """What all weights are multiplied by, given their sum."""


@dataclass(frozen=True)
class MeanOverSamples(Reduction):
    """For losses that are means over samples: the whole is the mean over all, also where batches differ in size.

    Args:
        count: how many samples a batch has; without it, the length of the first tensor in it. With a mean over labels
            that is not over all of them alike, what it is over.

    Example:
        >>> import torch
        >>> reduction = MeanOverSamples()
        >>> reduction.weight((torch.zeros(3, 2), torch.zeros(3))), reduction.scale(3 + 5)
        (3.0, 0.125)
    """

    count: Callable[[Any], float] | None = None

    def weight(self, batch: Any) -> float:
        return float(self.count(batch) if self.count is not None else lengths(batch)[0])

    @property
    def guessed(self) -> bool:
        return self.count is None

    def scale(self, total: float) -> float:
        if not total > 0:
            raise ValueError(f"the batches count {total:g} samples together; there is no mean over so many.")
        return 1 / total


@dataclass(frozen=True)
class SumOverBatches(Reduction):
    """For losses that are sums over samples: batches are added up as they are."""

    def weight(self, batch: Any) -> float:
        return 1.0

    def scale(self, total: float) -> float:
        return 1.0


def shares(reduction: Reduction, counts: Sequence[float]) -> list[float]:
    """What the losses of several processes, each scaled to its own whole already, are multiplied by.

    Args:
        counts: the weights of each one's batches together; 0 where it has none, which then counts 0.
    """
    whole = reduction.scale(sum(counts))
    return [whole / reduction.scale(count) if count else 0.0 for count in counts]


def lengths(batch: Any) -> list[int]:
    """Of the tensors in a batch, of which the first one's may be its number of samples."""
    found = [len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim > 0]
    if not found:
        raise ValueError(
            f"a batch of type {type(batch).__name__} holds no tensor whose length could be its number of samples. "
            "Pass reduction=MeanOverSamples(count=...), or SumOverBatches()."
        )
    return found
