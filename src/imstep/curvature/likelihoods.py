"""Distributions of targets given a model's outputs: what a Fisher matrix is an expectation over."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_IGNORED = -100
"""The label that PyTorch's cross entropy leaves out by default."""


class Likelihood(ABC):
    """A distribution p(y | z) of a target y given outputs z, one independent draw a case.

    Outputs must be natural parameters: then the Hessian of -log p in z does not depend on y and is the Fisher matrix of
    the outputs, which :class:`Exact` relies on.
    """

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """-log p(y | z) up to a term without z; one entry a case, in any shape."""

    def counted(self, targets: Tensor) -> Tensor | None:
        """Which cases count, a mask of the shape of :meth:`losses`; None for all."""
        return None

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from p(· | z), in the form that :meth:`losses` takes them."""


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """y ~ N(z, variance I); a case is an entry of the first dimension, whose other dimensions are added up.

        -log p = ‖y - z‖² / (2 variance)

    The mean over N cases of d outputs is d/(2 variance) times PyTorch's mean squared error, which divides by N d.

    Args:
        variance: > 0.

    Raises:
        ValueError: the variance is not positive.

    Example:
        >>> Gaussian().losses(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([2.5000])
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ValueError(f"variance must be positive, got {self.variance}.")

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _check_shapes(outputs, targets)
        return _by_case(F.mse_loss(outputs, targets, reduction="none")) / (2 * self.variance)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(outputs).normal_(0, math.sqrt(self.variance), generator=generator)
        return outputs + noise


@dataclass(frozen=True)
class Categorical(Likelihood):
    """y ~ softmax(z), classes along dimension 1 as for cross entropy; each row of class scores is a case.

        -log p = log Σ_c exp z_c - z_y

    Rows whose label is -100, which cross entropy ignores, are no cases.

    Example:
        >>> Categorical().losses(torch.zeros(1, 2), torch.tensor([1]))
        tensor([0.6931])
    """

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def counted(self, targets: Tensor) -> Tensor | None:
        counts = targets != _IGNORED
        return None if targets.is_floating_point() or bool(counts.all()) else counts

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        classes = min(1, outputs.ndim - 1)
        rows = outputs.movedim(classes, -1)
        chances = rows.softmax(-1).reshape(-1, rows.shape[-1])
        drawn = torch.multinomial(chances, 1, generator=generator)
        return drawn.reshape(rows.shape[:-1])


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """y ~ Bernoulli(sigmoid(z)) in each entry; a case is an entry of the first dimension, the others being added up.

        -log p = log(1 + exp z) - y z

    Example:
        >>> Bernoulli().losses(torch.zeros(1), torch.ones(1))
        tensor([0.6931])
    """

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _by_case(F.binary_cross_entropy_with_logits(outputs, targets, reduction="none"))

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(outputs.sigmoid(), generator=generator)


@dataclass(frozen=True)
class Poisson(Likelihood):
    """y ~ Poisson(exp z) in each entry; a case is an entry of the first dimension, the others being added up.

        -log p = exp z - y z + log y!     (without log y!)

    Example:
        >>> Poisson().losses(torch.zeros(1), torch.ones(1))
        tensor([1.])
    """

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _check_shapes(outputs, targets)
        return _by_case(outputs.exp() - targets * outputs)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(outputs.exp(), generator=generator)


def _check_shapes(outputs: Tensor, targets: Tensor) -> None:
    """Raise where targets would make more of the outputs than there are."""
    if torch.broadcast_shapes(outputs.shape, targets.shape) != outputs.shape:
        raise ValueError(
            f"outputs have the shape {tuple(outputs.shape)}, and targets {tuple(targets.shape)}; there is a target for "
            "each output. Reshape one of them, as by targets.view_as(outputs)."
        )


def _by_case(losses: Tensor) -> Tensor:
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses
