"""The distributions that convex ends of a loss are -log p of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.islands import plain
from imstep.complexstep.loss_split import ConvexLoss
from imstep.curvature.direct import of_parameters
from imstep.curvature.sampling import drawn_labels, kept_dimension

aten = torch.ops.aten
_MEAN = 1  # how PyTorch numbers the reductions of its losses


class Family(ABC):
    """The distribution that a convex end of a loss is -log p of, up to its weight.

    Attributes:
        scaled: whether the loss tells its scale; of squared errors it does not, which is their variance.
        natural: whether z are natural parameters, so that the Hessian in z does not depend on the targets.
    """

    scaled = natural = True

    @abstractmethod
    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        """c, by which ℓ counts in the loss, as the shape of z takes it; ``passed``: the weights of the end's result."""

    @abstractmethod
    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        """∂ℓ/∂z for targets drawn from the model, in the shape of z."""

    def summed(self, end: ConvexLoss) -> list[int]:
        """The dimensions of z that make up one case."""
        return list(range(1, end.z.ndim))


class _Gaussian(Family):
    """ℓ = (z - y)²/2."""

    scaled = False

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return 2 * passed * (_share(end, 2) if end.func is aten.mse_loss.default else 1.0)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        return torch.empty_like(_z(end)).normal_(generator=generator)


class _Categorical(Family):
    """ℓ = log Σ exp z - z_y."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return (-passed).sum(end.args[1], keepdim=True).clamp(min=0)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        z = _z(end)
        return drawn_labels(z, end.args[1], generator).to(z.dtype)

    def summed(self, end: ConvexLoss) -> list[int]:
        return [end.args[1] % max(end.z.ndim, 1)] if end.z.ndim else []


class _LogSumExp(Family):
    """The same where z_y is another term of the loss."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return kept_dimension(end, passed).clamp(min=0)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        z = _z(end)
        return drawn_labels(z, end.args[1][0], generator).to(z.dtype)

    def summed(self, end: ConvexLoss) -> list[int]:
        return [end.args[1][0] % end.z.ndim]


class _Bernoulli(Family):
    """ℓ = log(1 + exp z) - y z."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        _, y, weight, positive = [*end.args, None, None][:4]
        c = passed * _share(end, 4)
        c = c if weight is None else c * weight
        return c if positive is None else c * (1 + (positive - 1) * y)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        p = _z(end).sigmoid()
        return p - torch.bernoulli(p, generator=generator)


class _Softplus(Family):
    """The same as log(1 + exp βz)/β."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return passed / self._beta(end)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        beta = self._beta(end)
        p = (beta * _z(end)).sigmoid()
        return beta * (p - torch.bernoulli(p, generator=generator))

    def _beta(self, end: ConvexLoss) -> Any:
        return end.args[1] if len(end.args) > 1 else 1


class _LogSigmoid(_Bernoulli):
    """The same for a y of 1, the loss -log sigmoid z."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return -passed


class _SoftMargin(Family):
    """The same as log(1 + exp(-yz)), for a y of -1 and 1."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return passed * _share(end, 2)

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        p = (end.args[1] * _z(end)).sigmoid()
        return end.args[1] * (p - torch.bernoulli(p, generator=generator))


class _Probability(Family):
    """ℓ = -y log z - (1 - y) log(1 - z): not of natural parameters."""

    natural = False

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        weight = end.args[2] if len(end.args) > 2 else None
        c = passed * _share(end, 3)
        return c if weight is None else c * weight

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        z = _z(end)
        y = torch.bernoulli(z, generator=generator)
        return torch.where(y > 0, -1 / z, 1 / (1 - z))


class _Poisson(Family):
    """ℓ = exp z - y z."""

    def weights(self, end: ConvexLoss, passed: Tensor) -> Tensor:
        return passed

    def drawn(self, end: ConvexLoss, generator: torch.Generator) -> Tensor:
        rate = _z(end).exp()
        return rate - torch.poisson(rate, generator=generator)


FAMILIES: dict[Any, Family] = {
    aten.mse_loss: _Gaussian(),
    aten.pow: _Gaussian(),
    aten.mul: _Gaussian(),
    aten._log_softmax: _Categorical(),
    aten.logsumexp: _LogSumExp(),
    aten.binary_cross_entropy_with_logits: _Bernoulli(),
    aten.binary_cross_entropy: _Probability(),
    aten.softplus: _Softplus(),
    aten.log_sigmoid_forward: _LogSigmoid(),
    aten.soft_margin_loss: _SoftMargin(),
    aten.exp: _Poisson(),
}
"""By the operator that computes ℓ; the others, such as Huber's loss, are of no distribution in natural use."""


def family(end: ConvexLoss) -> Family | None:
    """The distribution of an end; None where it is none."""
    return FAMILIES.get(end.func.overloadpacket)


def is_penalty(end: ConvexLoss) -> bool:
    """Whether an end is the square of parameters themselves, or of how far they are from constants."""
    return isinstance(family(end), _Gaussian) and of_parameters(end.z)


def _z(end: ConvexLoss) -> Tensor:
    return plain(end.z).detach()


def _share(end: ConvexLoss, reduction: int) -> float:
    """1/n where the operator takes the mean of n losses; its reduction is the argument of this number."""
    kind = end.args[reduction] if len(end.args) > reduction else _MEAN
    return 1 / max(end.z.numel(), 1) if kind == _MEAN else 1.0
