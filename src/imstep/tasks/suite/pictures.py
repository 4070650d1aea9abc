"""Pictures as functions: a network maps places to brightness.

Sources: Sitzmann, Martel, Bergman, Lindell and Wetzstein, NeurIPS 2020 (sine layers); Tancik et al., NeurIPS 2020
(Fourier features).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from imstep.tasks.base import DataNotFoundError, Metric, Surface
from imstep.tasks.examples import Batch, ExampleTask
from imstep.tasks.models import mlp

__all__ = ["TASKS", "FourierFeatures", "SineLayer", "photograph"]

SIDE = 128
SHRINKING = 2
TOP, LEFT = 60, 60
"""Corner of the part of the photograph that is taken."""
FREQUENCY = 30.0
BANDWIDTH = 10.0


class SineLayer(nn.Module):
    """sin(30 (W x + b)), initialised so that all layers' outputs are spread alike.

    Args:
        fan_in, fan_out: numbers in and out.
        first: whether its inputs are places.
    """

    def __init__(self, fan_in: int, fan_out: int, *, first: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(fan_in, fan_out)
        bound = 1 / fan_in if first else math.sqrt(6 / fan_in) / FREQUENCY
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(FREQUENCY * self.linear(x))


class FourierFeatures(nn.Module):
    """sin and cos of places (k, 2) in random directions, at frequencies of deviation 10 a picture: (k, 2 count)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        # Places span 2 here, and 1 in the paper.
        self.register_buffer("frequencies", math.pi * BANDWIDTH * torch.randn(2, count))

    def forward(self, places: Tensor) -> Tensor:
        angles = places @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)


def _sines() -> nn.Sequential:
    widths = (2, 128, 128, 128)
    layers = [SineLayer(a, b, first=at == 0) for at, (a, b) in enumerate(pairwise(widths))]
    last = nn.Linear(128, 1)
    bound = math.sqrt(6 / 128) / FREQUENCY
    nn.init.uniform_(last.weight, -bound, bound)
    nn.init.constant_(last.bias, 0.5)
    return nn.Sequential(*layers, last)


def _fourier() -> nn.Sequential:
    return nn.Sequential(FourierFeatures(128), *mlp((256, 128, 128, 1)))


def photograph(shift: int = 0) -> Tensor:
    """(128, 128) brightness in [0, 1], float64, first row on top: a part of the photograph of a palace in scikit-learn.

    Args:
        shift: pixels of the original, twice as fine, to the right and down.

    Raises:
        DataNotFoundError: scikit-learn or Pillow is not installed.
    """
    try:
        from sklearn.datasets import load_sample_image

        pixels = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float64)
    except ImportError as error:
        raise DataNotFoundError(
            "the picture tasks read a photograph that scikit-learn ships, by Pillow. Install both: "
            "pip install 'imstep[tasks]' pillow."
        ) from error
    size = SIDE * SHRINKING
    part = pixels[TOP + shift : TOP + shift + size, LEFT + shift : LEFT + shift + size].mean(2) / 255
    return part.reshape(SIDE, SHRINKING, SIDE, SHRINKING).mean((1, 3))


def _places(shift: int = 0) -> Tensor:
    """(128², 2) places (x, y) of its pixels in [-1, 1]², row by row."""
    middle = (2 * torch.arange(SIDE, dtype=torch.float64) + 1 + 2 * shift / SHRINKING) / SIDE - 1
    down, right = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([right, down], 2).reshape(-1, 2)


def _load(data: Path | None) -> tuple[Batch, Batch]:
    """The pixels; held out are pixels half a pixel further on."""
    train, between = (Batch(_places(shift), photograph(shift).reshape(-1, 1)) for shift in (0, 1))
    return train, between


def _draw(model: nn.Module) -> tuple[Surface, Surface]:
    parameter = next(model.parameters())
    made = model(_places().to(parameter)).double().cpu().reshape(SIDE, SIDE)
    exact, found = (
        Surface(values.flip(0).tolist(), ((-1.0, 1.0), (-1.0, 1.0)), ("x", "y"), "gray")
        for values in (photograph(), made)
    )
    return exact, found


_PSNR = Metric(
    "PSNR in dB",
    lambda outputs, targets: (outputs - targets).double().square().mean(1),
    lambda mean: -10 * math.log10(mean) if mean > 0 else math.inf,
)  # fmt: skip


def _task(name: str, title: str, words: str, model: Callable[[], nn.Module]) -> ExampleTask:
    return ExampleTask(
        name, title, f"A photograph of 128 x 128 pixels (scikit-learn); {words}; mean squared error. Held out: pixels "
        "in between.", _load, model, nn.MSELoss(), _PSNR, unit="pixels", draw=_draw, budget=1000.0,
    )  # fmt: skip


TASKS = (
    _task("picture-sines", "A photograph by sine layers", "sine layers 2-128-128-128-1", _sines),
    _task(
        "picture-fourier", "A photograph by Fourier features", "128 random frequencies, tanh MLP 256-128-128-1",
        _fourier,
    ),
)  # fmt: skip
