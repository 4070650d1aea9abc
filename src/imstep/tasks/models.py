"""The networks of the built-in tasks: plain `torch.nn`, nothing that imstep needs to know about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["Periodic", "autoencoder", "convolutional_classifier", "mlp"]


def _xavier(model: nn.Sequential) -> nn.Sequential:
    """Xavier-normal weights and zero biases, as in the published autoencoder and PINN experiments."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _stack(widths: Sequence[int], activation: type[nn.Module]) -> list[nn.Module]:
    """Linear layers of the given widths with an activation after each but the last."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(fan_in, fan_out))
        if i < len(widths) - 2:
            layers.append(activation())
    return layers


def autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """An encoder of the given widths and its mirror image: tanh inside, linear code, sigmoid output.

    Args:
        widths: from the input down to the code, for example (64, 32, 8) for 64-32-8-32-64.
    """
    encoder = _stack(widths, nn.Tanh)
    decoder = _stack(tuple(reversed(widths)), nn.Tanh)
    return _xavier(nn.Sequential(*encoder, *decoder, nn.Sigmoid()))


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """A tanh multilayer perceptron from inputs (k, widths[0]) to outputs (k, widths[-1]), linear at the end."""
    return _xavier(nn.Sequential(*_stack(widths, nn.Tanh)))


class Periodic(nn.Module):
    """Replaces one coordinate x of points (k, d) by sin(2πx/period) and cos(2πx/period): (k, d + 1).

    Args:
        axis: which coordinate.
        period: its period, > 0.
    """

    def __init__(self, axis: int, period: float) -> None:
        super().__init__()
        self.axis, self.frequency = axis, 2 * math.pi / period

    def forward(self, points: Tensor) -> Tensor:
        angle = self.frequency * points[:, self.axis : self.axis + 1]
        others = [points[:, : self.axis], points[:, self.axis + 1 :]]
        return torch.cat([torch.sin(angle), torch.cos(angle), *others], 1)


def convolutional_classifier(
    side: int, channels: Sequence[int], hidden: int, classes: int = 10
) -> nn.Sequential:
    """Blocks of 3x3 convolution, GELU and 2x2 mean pooling, then two linear layers: smooth throughout.

    Args:
        side: inputs are (k, 1, side, side); divisible by 2 as often as there are blocks.
        channels: output channels of each block.
        hidden: width of the layer before the logits.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip((1, *channels[:-1]), channels, strict=True):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)]
    flat = channels[-1] * (side // 2 ** len(channels)) ** 2
    layers += [nn.Flatten(), nn.Linear(flat, hidden), nn.GELU(), nn.Linear(hidden, classes)]
    return _xavier(nn.Sequential(*layers))
