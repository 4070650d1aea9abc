"""Deep autoencoders as published: sigmoid units, a linear code, sparse initial weights.

Sources: Hinton and Salakhutdinov, Science 2006; Martens, ICML 2010 (initialisation); Sutskever, Martens, Dahl and
Hinton, ICML 2013, Table 1 (training errors).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from imstep.tasks.base import Metric
from imstep.tasks.data import fashion_mnist, reconstruction
from imstep.tasks.examples import Batch, ExampleTask, Loader
from imstep.tasks.mnist import mnist

__all__ = ["TASKS", "curves", "deep_autoencoder"]

INCOMING = 15
CURVES = 20_000
SIDE = 28
STROKES = 64
"""Points that a curve is drawn by."""


def deep_autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """An encoder of the given widths and its mirror image: sigmoid units, linear code.

    A unit has 15 incoming weights drawn from a normal distribution, the others and all biases are zero.
    """
    through = (*widths, *reversed(widths[:-1]))
    layers: list[nn.Module] = []
    for at in range(len(through) - 1):
        layer = nn.Linear(through[at], through[at + 1])
        with torch.no_grad():
            kept = torch.rand_like(layer.weight).argsort(1) < INCOMING
            layer.weight.normal_().mul_(kept)
            layer.bias.zero_()
        layers += [layer] if at == len(widths) - 2 else [layer, nn.Sigmoid()]
    return nn.Sequential(*layers)


def curves(count: int, seed: int) -> Tensor:
    """Pictures (count, 784) in [0, 1] of curves through three random points, as pixels near a curve are darkened.

    The curve is the quadratic one with the points as control points, so that it stays inside.
    """
    random = Generator().manual_seed(seed)
    t = torch.linspace(0, 1, STROKES)
    weights = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], 1)
    pixels, made = torch.arange(SIDE), []
    for size in torch.full((count,), 1).split(2000):
        points = 3 + (SIDE - 7) * torch.rand(len(size), 3, 2, generator=random)
        path = weights @ points
        down, right = (torch.exp(-((path[..., axis, None] - pixels) ** 2)) for axis in (0, 1))
        length = points.diff(dim=1).norm(dim=2).sum(1)[:, None, None] / STROKES
        made.append(1 - torch.exp(-2 * length * (down.mT @ right)).flatten(1))
    return torch.cat(made)


def _curves(data: Path | None) -> tuple[Batch, Batch]:
    train, heldout = curves(CURVES, 0), curves(CURVES // 2, 1)
    return Batch(train, train), Batch(heldout, heldout)


def _task(name: str, title: str, words: str, load: Loader, widths: Sequence[int]) -> ExampleTask:
    return ExampleTask(
        name, title, f"{words}; sigmoid MLP {'-'.join(map(str, widths))} and back; mean squared error. Metric: squared "
        "error a picture.", load, partial(deep_autoencoder, widths), nn.MSELoss(),
        Metric("squared error a picture", lambda outputs, targets: (outputs - targets).square().sum(1)),
        image_shape=(SIDE, SIDE), budget=2000.0,
    )  # fmt: skip


_MNIST_WIDTHS = (784, 1000, 500, 250, 30)

TASKS = (
    _task(
        "curves-autoencoder", "CURVES, deep autoencoder", f"{CURVES:,} pictures (28x28) of random curves", _curves,
        (784, 400, 200, 100, 50, 25, 6),
    ),
    _task(
        "mnist-deep-autoencoder", "MNIST, deep autoencoder", "60,000 handwritten digits (28x28)",
        partial(reconstruction, mnist), _MNIST_WIDTHS,
    ),
    _task(
        "fashion-deep-autoencoder", "Fashion-MNIST, deep autoencoder", "60,000 pictures (28x28)",
        partial(reconstruction, fashion_mnist), _MNIST_WIDTHS,
    ),
)  # fmt: skip
