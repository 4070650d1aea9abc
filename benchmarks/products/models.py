"""The models on which products are measured: each a closure's loss on fixed data, float32.

Inputs, outputs and targets are kept apart, as Gauss-Newton products and peers need them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its data and loss.

    Attributes:
        name: as in the tables.
        description: sizes, in words.
        model: its parameters are what is differentiated.
        inputs: the data.
        targets: what ``model(inputs)`` is compared with.
        loss: outputs, targets -> scalar.
    """

    name: str
    description: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is differentiated."""
        return list(self.model.parameters())

    def closure(self) -> Tensor:
        """The loss."""
        return self.loss(self.model(self.inputs), self.targets)

    def to(self, dtype: torch.dtype) -> Subject:
        """In another precision; the model itself, and copies of the data."""
        inputs, targets = (t.to(dtype) if t.is_floating_point() else t for t in (self.inputs, self.targets))
        return replace(self, model=self.model.to(dtype), inputs=inputs, targets=targets)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets."""
        return self.model(self.inputs), self.targets


# --- deep autoencoder -----------------------------------------------------------------------------------------------

_WIDTHS = (784, 1000, 500, 250, 30)


def autoencoder(device: torch.device) -> Subject:
    """The deep autoencoder of Hinton and Salakhutdinov (Science 313, 2006, 504-507), with tanh."""
    widths = _WIDTHS + _WIDTHS[-2::-1]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(device)
    x = torch.rand(512, _WIDTHS[0], device=device)
    return Subject("MLP", "784-1000-500-250-30 mirrored, tanh, batch 512", model, x, x, nn.MSELoss())


# --- ResNet-18 ------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(device: torch.device) -> Subject:
    """ResNet-18 (He et al. 2016) with a 3 x 3 stem for small images, evaluation mode."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    before = 64
    for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(before, after, stride), _Block(after, after, 1)]
        before = after
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).to(device).eval()
    x, labels = torch.randn(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device)
    loss = nn.CrossEntropyLoss()
    return Subject("ResNet-18", "evaluation mode, 16 x 3 x 32 x 32", model, x, labels, loss)


# --- recurrent networks ---------------------------------------------------------------------------------------------


class _Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = layer(32, 128, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def recurrent(layer: type[nn.RNNBase], device: torch.device) -> Subject:
    """One recurrent layer and a linear classifier of its last state."""
    model = _Recurrent(layer).to(device)
    x, labels = torch.randn(64, 30, 32, device=device), torch.randint(10, (64,), device=device)
    loss = nn.CrossEntropyLoss()
    return Subject(layer.__name__, "32 -> 128, batch 64, 30 steps", model, x, labels, loss)


# --- GPT ------------------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = lambda t: t.view(batch, length, self.heads, -1).transpose(1, 2)
        q, k, v = (split(t) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        vocabulary, length, width, heads, layers = 256, 64, 128, 4, 4
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(_Attention(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x))).flatten(0, 1)


def gpt(device: torch.device) -> Subject:
    """A decoder-only transformer with pre-normalisation and causal attention."""
    model = _Gpt().to(device)
    tokens = torch.randint(256, (16, 64), device=device)
    targets = torch.randint(256, (16 * 64,), device=device)
    loss = nn.CrossEntropyLoss()
    return Subject("GPT", "4 layers, width 128, 16 x 64 tokens", model, tokens, targets, loss)


# --- physics-informed network ---------------------------------------------------------------------------------------


class _WaveResiduals(nn.Module):
    """u_tt - 4 u_xx at inner points and u at the points of the edge."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        widths = (2, 50, 50, 50, 50, 1)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.Tanh()]
        self.u = nn.Sequential(*layers[:-1])
        self.inner = inner

    def forward(self, points: Tensor) -> Tensor:
        at = points[: self.inner].clone().requires_grad_()
        first = torch.autograd.grad(self.u(at).sum(), at, create_graph=True)[0]
        by_xx = torch.autograd.grad(first[:, 0].sum(), at, create_graph=True)[0][:, 0]
        by_tt = torch.autograd.grad(first[:, 1].sum(), at, create_graph=True)[0][:, 1]
        return torch.cat([by_tt - 4 * by_xx, self.u(points[self.inner :])[:, 0]])


def pinn(device: torch.device) -> Subject:
    """The wave equation on the unit square: first and second input derivatives by ``create_graph``."""
    inner, edge = 1000, 200
    points = torch.rand(inner + edge, 2, device=device)
    points[inner : inner + edge // 2, 1] = 0.0  # the start
    points[inner + edge // 2 :, 0] = points[inner + edge // 2 :, 0].round()  # both ends
    targets = torch.where(points[:, 1] == 0, torch.sin(math.pi * points[:, 0]), 0.0)
    model = _WaveResiduals(inner).to(device)
    description = "2-50-50-50-50-1 tanh, wave equation, 1,000 + 200 points"
    return Subject("PINN", description, model, points, targets, nn.MSELoss())


SUBJECTS: dict[str, Callable[[torch.device], Subject]] = {
    "MLP": autoencoder,
    "ResNet-18": resnet18,
    "LSTM": partial(recurrent, nn.LSTM),
    "GRU": partial(recurrent, nn.GRU),
    "GPT": gpt,
    "PINN": pinn,
}


def build(name: str, device: torch.device, seed: int) -> Subject:
    """A subject by name, its weights and data drawn from ``seed``."""
    torch.manual_seed(seed)
    return SUBJECTS[name](device)
