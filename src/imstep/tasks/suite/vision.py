"""Classification of pictures by residual networks and by a mixer.

Sources: He, Zhang, Ren and Sun, CVPR 2016, section 4.2; Tolstikhin et al., NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from imstep.tasks.data import fashion_mnist
from imstep.tasks.examples import ACCURACY, Batch, ExampleTask

__all__ = ["TASKS", "Mixer", "resnet"]

CHANNELS = (16, 32, 64)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to their input, of which every other pixel may be taken."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.stride, self.more = fan_out // fan_in, fan_out - fan_in
        self.first = nn.Conv2d(fan_in, fan_out, 3, self.stride, 1, bias=False)
        self.second = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(fan_out) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        changed = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.relu(changed + F.pad(kept, (0, 0, 0, 0, 0, self.more)))


def resnet(depth: int, classes: int = 10) -> nn.Sequential:
    """A residual network of 6 n + 2 layers for (k, 1, h, w): 16, 32 and 64 channels, shortcuts without weights."""
    blocks: list[nn.Module] = []
    width = CHANNELS[0]
    for channels in CHANNELS:
        for _ in range((depth - 2) // 6):
            blocks.append(ResidualBlock(width, channels))
            width = channels
    model = nn.Sequential(
        nn.Conv2d(1, CHANNELS[0], 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS[0]), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


class MixerBlock(nn.Module):
    """A GELU layer along the patches, then one along the channels, each added to what it was given: (k, n, width)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.along = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.before(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.between(x))


class Mixer(nn.Module):
    """Patches of 4x4 pixels, mixed by blocks, averaged; pictures (k, 1, side, side) to logits (k, classes)."""

    def __init__(self, side: int = 28, width: int = 64, blocks: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock((side // 4) ** 2, width) for _ in range(blocks)))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.patches(pictures).flatten(2).transpose(1, 2)
        return self.readout(self.norm(self.blocks(patches)).mean(1))


def _pictures(data: Path | None) -> tuple[Batch, Batch]:
    train, heldout = (Batch(b.inputs.reshape(-1, 1, 28, 28), b.targets) for b in fashion_mnist(data))
    return train, heldout


def _task(name: str, title: str, words: str, model: Callable[[], nn.Module]) -> ExampleTask:
    return ExampleTask(
        name, f"Fashion-MNIST, {title}", f"60,000 pictures (28x28); {words}; cross entropy.", _pictures, model,
        nn.CrossEntropyLoss(), ACCURACY, (28, 28), chunk=1000,
    )  # fmt: skip


_LAYERS = "convolutions of 16, 32 and 64 channels with batch normalisation"

TASKS = (
    _task("fashion-resnet8", "residual network of 8 layers", f"7 {_LAYERS}", partial(resnet, 8)),
    _task("fashion-resnet20", "residual network of 20 layers", f"19 {_LAYERS}", partial(resnet, 20)),
    _task("fashion-mixer", "mixer", "49 patches, four blocks of width 64, layer normalisation, GELU", partial(Mixer)),
)
