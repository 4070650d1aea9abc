"""Which gradient a step answers to: exchangeable estimates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class GradientEstimate(ABC):
    """Makes the right-hand side of a step's system from the gradients of batches."""

    @property
    @abstractmethod
    def remembers(self) -> bool:
        """Whether an estimate needs the last one, which is then kept."""

    @abstractmethod
    def estimate(self, last: Tensor | None, gradient: Tensor, steps: int) -> Tensor:
        """The estimate, (n,).

        Args:
            last: the estimate of the last step, (n,); None where the step starts afresh.
            gradient: of the present batch, (n,).
            steps: how many steps were taken before.
        """


@dataclass(frozen=True)
class BatchGradient(GradientEstimate):
    """The gradient of the present batch."""

    @property
    def remembers(self) -> bool:
        return False

    def estimate(self, last: Tensor | None, gradient: Tensor, steps: int) -> Tensor:
        return gradient


@dataclass(frozen=True)
class AveragedGradient(GradientEstimate):
    """A running average over the last batches: b <- β b + (1 - β) g.

    β starts at 0 and grows to ``decay`` as k / (k + warm_up) over the steps k, since the first gradients change from
    step to step by more than noise. The direction must go down on the present batch as well; where it does not, or
    the last step was refused, the average starts afresh. Take it with steps shorter than Newton's, such as
    ``Armijo(first=0.7)``: a part of b has been answered before.

    It is for losses whose curvature differs little from batch to batch, such as squared errors. With cross entropy the
    curvature of examples that are learnt vanishes, old gradients meet no resistance, and training fails.

    Args:
        decay: the largest β, in [0, 1).
        warm_up: the step at which β would be 1/2, > 0.

    Source: Polyak's heavy ball, with Newton steps; decay and warm-up are our choice by measurement.

    Example:
        >>> import torch
        >>> average = AveragedGradient(decay=0.8)
        >>> average.estimate(torch.tensor([1.0]), torch.tensor([0.0]), steps=1000)
        tensor([0.8000])
    """

    decay: float = 0.8
    warm_up: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay, the weight of the past, must lie in [0, 1), got {self.decay}.")
        if not self.warm_up > 0:
            raise ValueError(f"warm_up, in steps, must be positive, got {self.warm_up}.")

    @property
    def remembers(self) -> bool:
        return True

    def estimate(self, last: Tensor | None, gradient: Tensor, steps: int) -> Tensor:
        if last is None:
            return gradient
        return gradient.lerp(last, min(self.decay, steps / (steps + self.warm_up)))
