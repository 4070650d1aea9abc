"""Sixteen small problems on mini-batches, of the kinds that people begin with: each trains in seconds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

HELDOUT = 1000
"""Examples that no problem trains on."""

Data: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SmallProblem:
    """Data, a model and a loss.

    Attributes:
        name: in the table.
        data: (examples, generator) -> inputs and targets.
        model: makes it.
        examples: that are trained on.
        size: of a batch.
        loss: of outputs and targets.
        epochs: how many.
    """

    name: str
    data: Callable[[int, Generator], Data]
    model: Callable[[], nn.Module]
    examples: int
    size: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    epochs: int = 5


# --- data -----------------------------------------------------------------------------------------------------------


def scores(n: int, inputs: int, outputs: int, g: Generator) -> Data:
    """Inputs, and what a random network makes of them."""
    x = torch.randn(n, inputs, generator=g)
    first, last = torch.randn(inputs, 30, generator=g) / inputs**0.5, torch.randn(30, outputs, generator=g) / 30**0.5
    return x, torch.tanh(2 * x @ first) @ last


def classes(inputs: int, count: int, noise: float = 0.0) -> Callable[[int, Generator], Data]:
    """The largest score, a share ``noise`` of the labels being random."""

    def data(n: int, g: Generator) -> Data:
        x, y = scores(n, inputs, count, g)
        random = torch.randint(0, count, (n,), generator=g)
        return x, torch.where(torch.rand(n, generator=g) < noise, random, y.argmax(1))

    return data


def linear_classes(n: int, g: Generator) -> Data:
    x = torch.randn(n, 20, generator=g)
    return x, (x @ torch.randn(20, 3, generator=g)).argmax(1)


def noisy_images(n: int, g: Generator) -> Data:
    y = torch.randint(0, 4, (n,), generator=g)
    patterns = F.interpolate(torch.randn(4, 1, 4, 4, generator=g), 12)
    return patterns[y] + 3 * torch.randn(n, 1, 12, 12, generator=g), y


def heavy_tails(n: int, g: Generator) -> Data:
    """Noise by Student's t with two degrees of freedom: its variance is infinite."""
    x, y = scores(n, 10, 1, g)
    normal, square = torch.randn(n, 1, generator=g), torch.randn(n, 2, generator=g).square().sum(1, keepdim=True)
    return x, y + 0.3 * normal / (square / 2).sqrt()


def rare_class(n: int, g: Generator) -> Data:
    x, y = scores(n, 15, 1, g)
    return x, (y > y.quantile(0.95)).float()


def curved_sheet(n: int, g: Generator) -> Data:
    x = torch.sigmoid(torch.randn(n, 4, generator=g) @ torch.randn(4, 40, generator=g))
    x = x + 0.02 * torch.randn(n, 40, generator=g)
    return x, x


def words(n: int, g: Generator) -> Data:
    x = torch.randint(0, 200, (n, 12), generator=g)
    return x, torch.randn(200, 3, generator=g)[x].sum(1).argmax(1)


def sums(n: int, g: Generator) -> Data:
    x = torch.randn(n, 10, 4, generator=g)
    value = x[:, :, 0].sum(1) + 2 * x[:, 2, 1]
    return x, (value > 1.5).long() + (value > -1.5).long()


def maxima(n: int, g: Generator) -> Data:
    x = torch.randn(n, 8, 6, generator=g)
    return x, x[:, :, :3].max(1).values.argmax(1)


# --- models ---------------------------------------------------------------------------------------------------------


def dense(
    *widths: int, act: Callable[[], nn.Module] = nn.ReLU, extra: Callable[[int], nn.Module] | None = None
) -> nn.Module:
    """Linear layers with an activation, and ``extra`` of each width, between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        if layers:
            layers += [act()] if extra is None else [extra(a), act()]
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    block = lambda a, b: (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*block(1, 8), *block(8, 16), nn.Flatten(), nn.Linear(144, 4))


class Bag(nn.Module):
    """The mean of words' vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(200, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.words(x).mean(1))


class Recurrent(nn.Module):
    """The last state of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """One layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.mix, self.last = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        k = self.norm(h)
        return self.last((h + self.mix(k, k, k, need_weights=False)[0]).mean(1))


MSE, HUBER, BINARY = F.mse_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits
WEAK = lambda width: nn.Dropout(0.1)
STRONG = lambda width: nn.Dropout(0.5)
TANH = nn.Tanh

PROBLEMS = (
    SmallProblem("3 classes, dropout 0.1", classes(20, 3), lambda: dense(20, 64, 3, extra=WEAK), 600, 100, epochs=8),
    SmallProblem("linear classes", linear_classes, lambda: dense(20, 32, 3, extra=WEAK), 600, 100, epochs=8),
    SmallProblem("a fifth of labels random", classes(20, 5, 0.2), lambda: dense(20, 64, 5), 600, 50),
    SmallProblem("batches of 16", classes(20, 5), lambda: dense(20, 64, 5), 320, 16, epochs=3),
    SmallProblem("batches of 300", classes(20, 5), lambda: dense(20, 64, 5, act=TANH), 1200, 300, epochs=10),
    SmallProblem("dropout 0.5, twice", classes(30, 4), lambda: dense(30, 64, 64, 4, extra=STRONG), 600, 60, epochs=5),
    SmallProblem("batch normalisation", classes(30, 4), lambda: dense(30, 48, 48, 4, extra=nn.BatchNorm1d), 600, 50),
    SmallProblem("convolutions", noisy_images, cnn, 320, 40, epochs=3),
    SmallProblem("regression, heavy tails", heavy_tails, lambda: dense(10, 64, 1, act=TANH), 600, 50, MSE),
    SmallProblem("Huber's loss, heavy tails", heavy_tails, lambda: dense(10, 64, 1, act=TANH), 600, 50, HUBER),
    SmallProblem("autoencoder", curved_sheet, lambda: dense(40, 50, 4, 50, 40), 600, 100, MSE, epochs=8),
    SmallProblem("embedding", words, Bag, 600, 50),
    SmallProblem("LSTM", sums, Recurrent, 400, 50, epochs=5),
    SmallProblem("one in twenty", rare_class, lambda: dense(15, 50, 1), 800, 50, BINARY),
    SmallProblem("200 inputs, 300 examples", classes(200, 2), lambda: dense(200, 50, 2), 300, 30),
    SmallProblem("attention", maxima, Attention, 400, 50, epochs=5),
)
