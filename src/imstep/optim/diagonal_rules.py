"""Diagonal second-order methods with fixed rates: what AdaHessian and Sophia make of momentum and curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.curvature.hessian import hessian_of
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised
from imstep.curvature.sampled_diagonal import sampled_diagonal
from imstep.linalg.random_maps import random_signs
from imstep.optim.record import Cost


class DiagonalRule(ABC):
    """A method that divides a running mean m of gradients by a running mean h of diagonal curvature, entry by entry.

    Attributes:
        beta1, beta2: weights of the past in m and h, in [0, 1).
        every: steps between two estimates of the diagonal, >= 1.
    """

    beta1: float
    beta2: float
    every: int

    @property
    def needs_graph(self) -> bool:
        """Whether an estimate differentiates the loss further."""
        return False

    @abstractmethod
    def estimate(
        self, point: Linearised, parameters: ParameterVector, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        """A sample of what h is the mean of, (n,), and what it cost."""

    @abstractmethod
    def step(self, momentum: Tensor, curvature: Tensor, steps: int, estimates: int) -> Tensor:
        """What lr times is subtracted, (n,), from means m and h of so many gradients and samples."""

    def _check(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 and beta2 must lie in [0, 1), got {self.beta1} and {self.beta2}.")
        if self.every < 1:
            raise ValueError(f"every, the steps between two estimates, is at least 1, got {self.every}.")


@dataclass(frozen=True)
class AdaHessianRule(DiagonalRule):
    """AdaHessian.

        m <- β₁ m + (1 - β₁) g,   h <- β₂ h + (1 - β₂) D²,   D = |z * H z| with random signs z
        w <- w - lr m' / (h'^(power/2) + eps),   m' = m / (1 - β₁^t),   h' = h / (1 - β₂^t)

    Args:
        beta1, beta2: see :class:`DiagonalRule`.
        power: of the curvature, in (0, 1].
        eps: > 0.
        spatial: whether D is averaged over the positions of a convolution's kernel.
        every: steps between two probes z; t counts them in h'.

    Source: Yao et al., AAAI 2021, arXiv 2006.00719, Algorithm 1; the numbers, and the average of absolute values, are
        those of its authors' program.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    power: float = 1.0
    eps: float = 1e-4
    spatial: bool = True
    every: int = 1

    def __post_init__(self) -> None:
        self._check()
        if not (0 < self.power <= 1 and self.eps > 0):
            raise ValueError(f"power lies in (0, 1] and eps is positive, got {self.power} and {self.eps}.")

    def estimate(
        self, point: Linearised, parameters: ParameterVector, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        sample = _probed(point, parameters, generator).abs()
        if self.spatial:
            parts = parameters.unflatten(sample)
            sample = parameters.flatten([_over_kernel(part) for part in parts])
        return sample.square(), Cost(hessian_products=1)

    def step(self, momentum: Tensor, curvature: Tensor, steps: int, estimates: int) -> Tensor:
        mean = momentum / (1 - self.beta1**steps)
        return mean / ((curvature / (1 - self.beta2**estimates)) ** (self.power / 2) + self.eps)


@dataclass(frozen=True)
class HessianScaledMomentum(DiagonalRule):
    """Momentum with a rate for each parameter by its curvature.

        m <- β₁ m + (1 - β₁) g,   h <- β₂ h + (1 - β₂) |z * H z| with random signs z, every few steps
        w <- w - lr m' / (h' + floor · mean h'),   m' = m / (1 - β₁^t),   h' = h / (1 - β₂^t)

    Nothing is clipped, and no unit matters: lr = 1 is the step of a diagonal Newton method.

    Args:
        beta1, beta2, every: see :class:`DiagonalRule`.
        floor: > 0.

    Source: LeCun, Bottou, Orr and Müller, Efficient BackProp (1998), section 9.1, the stochastic diagonal
        Levenberg-Marquardt method, with momentum; estimates by exact products in place of squared gradients.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    floor: float = 0.1
    every: int = 10

    def __post_init__(self) -> None:
        self._check()
        if not self.floor > 0:
            raise ValueError(f"floor, relative to the mean curvature, is positive, got {self.floor}.")

    def estimate(
        self, point: Linearised, parameters: ParameterVector, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        return _probed(point, parameters, generator).abs(), Cost(hessian_products=1)

    def step(self, momentum: Tensor, curvature: Tensor, steps: int, estimates: int) -> Tensor:
        mean = curvature / (1 - self.beta2**estimates)
        tiny = torch.finfo(mean.dtype).tiny  # of a loss that is linear
        return momentum / (1 - self.beta1**steps) / (mean + self.floor * mean.mean()).clamp(min=tiny)


@dataclass(frozen=True)
class SophiaH(DiagonalRule):
    """Sophia with Hutchinson's estimator.

        m <- β₁ m + (1 - β₁) g,   h <- β₂ h + (1 - β₂) z * H z with normal z, every few steps
        w <- w - lr clip(m / max(γ h, eps), ±1)

    Args:
        beta1, beta2, every: see :class:`DiagonalRule`.
        gamma: γ > 0: the less, the more entries are clipped.
        eps: > 0.

    Source: Liu et al., ICLR 2024, arXiv 2305.14342, Algorithms 1 and 3.
    """

    beta1: float = 0.96
    beta2: float = 0.99
    gamma: float = 0.01
    eps: float = 1e-12
    every: int = 10

    def __post_init__(self) -> None:
        self._check()
        if not (self.gamma > 0 and self.eps > 0):
            raise ValueError(f"gamma and eps are positive, got {self.gamma} and {self.eps}.")

    def estimate(
        self, point: Linearised, parameters: ParameterVector, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        z = torch.empty_like(point.gradient).normal_(generator=generator)
        return z * (hessian_of(point, parameters) @ z), Cost(hessian_products=1)

    def step(self, momentum: Tensor, curvature: Tensor, steps: int, estimates: int) -> Tensor:
        return (momentum / (self.gamma * curvature).clamp(min=self.eps)).clamp(-1, 1)


@dataclass(frozen=True)
class SophiaG(SophiaH):
    """Sophia with the Gauss-Newton-Bartlett estimator: the square of a gradient with sampled targets.

    As :class:`SophiaH`, with (Jᵀu)² in place of z * H z, where E[u uᵀ] is the Hessian of the loss in the outputs: for a
    cross-entropy u comes from labels drawn from the model. It is never negative. The loss must be a convex function of
    the model's outputs.

    Source: Liu et al., ICLR 2024, arXiv 2305.14342, Algorithms 2 and 3.
    """

    gamma: float = 0.05

    @property
    def needs_graph(self) -> bool:
        return True

    def estimate(
        self, point: Linearised, parameters: ParameterVector, generator: torch.Generator
    ) -> tuple[Tensor, Cost]:
        if not point.convex:
            raise ValueError(
                "the Gauss-Newton-Bartlett estimator needs a loss that is a convex function of the model's outputs, "
                "such as a cross-entropy or a squared error; this one has another form. Use SophiaH()."
            )
        return sampled_diagonal(point, parameters, generator), Cost(refreshes=1)


def _probed(point: Linearised, parameters: ParameterVector, generator: torch.Generator) -> Tensor:
    """z * H z with random signs z."""
    signs = random_signs((parameters.size,), point.gradient.dtype, generator).to(point.gradient)
    return signs * (hessian_of(point, parameters) @ signs)


def _over_kernel(part: Tensor) -> Tensor:
    """The mean over all dimensions but the first two, in their place."""
    return part if part.ndim < 3 else part.mean(tuple(range(2, part.ndim)), keepdim=True).expand_as(part)
