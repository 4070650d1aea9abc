"""What the accuracy sweep differentiates: the losses of small networks as functions of one flat vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

__all__ = ["NETWORKS", "Network", "Scalar", "Subject"]

Scalar = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A scalar function of a flat vector, a point and a direction: H(point) direction is what is measured.

    Args:
        loss_in: `loss_in(dtype)` -> the function, which maps a point (n,) of that dtype to a 0-dim tensor.
        point: (n,), float64 values that are exact in float32.
        direction: (n,), likewise.
    """

    loss_in: Callable[[torch.dtype], Scalar]
    point: torch.Tensor
    direction: torch.Tensor

    def reference(self) -> torch.Tensor:
        """H(point) direction by double backward in float64, shape (n,)."""
        x = self.point.double().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss_in(torch.float64)(x), x, create_graph=True)
        (product,) = torch.autograd.grad(gradient, x, self.direction.double())
        return product


@dataclass(frozen=True)
class Network:
    """A small network whose loss is the subject of a measurement."""

    name: str
    title: str
    model: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int
    examples: int = 16

    def subject(self, seed: int) -> Subject:
        """Weights, data and direction from `seed`, exact in float32 so that both dtypes see one point."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model().eval()
            inputs = torch.randn(self.examples, *self.input_shape)
            targets = torch.randint(self.classes, (self.examples,))
            point = nn.utils.parameters_to_vector(model.parameters()).detach()
            direction = torch.randn_like(point)
        shapes = {name: p.shape for name, p in model.named_parameters()}

        def loss_in(dtype: torch.dtype) -> Scalar:
            data = inputs.to(dtype)

            def loss(x: torch.Tensor) -> torch.Tensor:
                pieces = x.split([shape.numel() for shape in shapes.values()])
                weights = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
                return nn.functional.cross_entropy(functional_call(model, weights, (data,)), targets)

            return loss

        return Subject(loss_in, point.double(), direction.double())


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


NETWORKS = (
    Network("mlp", "MLP 16-24-24-5, tanh", _mlp, (16,), 5),
    Network("conv", "Conv net, two convolutions, tanh", _convolutional, (1, 8, 8), 5),
)
