"""Small networks of the kinds that people train: each with data and a loss, in float64, on any device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True, eq=False)
class Network:
    """A module with its data and what to minimise.

    Attributes:
        module: its parameters are what is differentiated.
        inputs: data.
        loss: module and data -> scalar.
        drawn: whether the loss draws random numbers, of which devices have different ones.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Callable[..., Tensor]
    drawn: bool = False

    def to(self, device: torch.device | str) -> Network:
        """A copy on a device."""
        inputs = tuple(t.to(device) for t in self.inputs)
        return Network(copy.deepcopy(self.module).to(device), inputs, self.loss, self.drawn)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is differentiated."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def closure(self) -> Tensor:
        """The loss, with the same random numbers each time."""
        if self.drawn:
            torch.manual_seed(5)
        return self.loss(self.module, *self.inputs)


def _squares(module: nn.Module, *inputs: Tensor) -> Tensor:
    found = module(*inputs)
    return ((found[0] if isinstance(found, tuple) else found) - 0.3).square().mean()


def _of(module: nn.Module, *inputs: Tensor, loss: Callable[..., Tensor] = _squares, drawn: bool = False) -> Network:
    doubled = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    return Network(module.double(), doubled, loss, drawn)


def _layers(*layers: nn.Module, shape: tuple[int, ...] = (6, 8), drawn: bool = False) -> Network:
    return _of(nn.Sequential(*layers), torch.randn(shape), drawn=drawn)


def _activated(kind: Callable[[], nn.Module]) -> Callable[[], Network]:
    return lambda: _layers(nn.Linear(8, 12), kind(), nn.Linear(12, 4), kind(), nn.Linear(4, 2))


def _normed(norm: Callable[[], nn.Module], evaluated: bool = False) -> Callable[[], Network]:
    def build() -> Network:
        made = _layers(
            nn.Conv2d(3, 8, 3, padding=1), norm(), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.Flatten(),
            nn.Linear(64, 3), shape=(4, 3, 12, 12),
        )  # fmt: skip
        return Network(made.module.train(not evaluated), made.inputs, made.loss)

    return build


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.second(F.relu(self.norm(self.first(x))))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def _classified(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(module(x), labels, label_smoothing=0.1)


def residual() -> Network:
    return _of(_Residual(), torch.randn(4, 6, 8, 8), torch.tensor([0, 2, 1, 2]), loss=_classified)


def depthwise() -> Network:
    return _layers(
        nn.Conv2d(4, 8, 3, groups=4, stride=2), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.Tanh(),
        nn.ConvTranspose2d(6, 2, 3, stride=2, dilation=2), shape=(2, 4, 9, 9),
    )  # fmt: skip


def volumes() -> Network:
    return _layers(nn.Conv3d(2, 4, 2), nn.Softplus(), nn.AvgPool3d(2), nn.Conv3d(4, 2, 1), shape=(2, 2, 5, 5, 5))


class _Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.tanh(self.down(x))
        deep = F.leaky_relu(self.deep(F.avg_pool2d(wide, 2)))
        deep = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        return self.up(torch.cat([wide, deep], 1))


def unet() -> Network:
    return _of(_Unet(), torch.randn(2, 2, 8, 8))


def recurrent(kind: type[nn.RNNBase]) -> Callable[[], Network]:
    return lambda: _of(kind(5, 6, num_layers=2, batch_first=True, bidirectional=True), torch.randn(3, 4, 5))


def packed(kind: type[nn.RNNBase]) -> Callable[[], Network]:
    """Sequences of different lengths."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        made, _ = module(pack_padded_sequence(x, [4, 3, 1], batch_first=True))
        return pad_packed_sequence(made, batch_first=True)[0].square().mean()

    return lambda: _of(kind(5, 6, batch_first=True), torch.randn(3, 4, 5), loss=loss)


class _Cells(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for now in x:
            state = self.cell(now, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def cells(kind: type[nn.RNNCellBase]) -> Callable[[], Network]:
    return lambda: _of(_Cells(kind), torch.randn(3, 2, 5))


def attention() -> Network:
    loss = lambda module, x: module(x, x, x, need_weights=False)[0].square().mean()
    return _of(nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8), loss=loss)


def encoder(dropout: float) -> Callable[[], Network]:
    layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout, activation="gelu", batch_first=True)
    return lambda: _of(layer(), torch.randn(2, 5, 8), drawn=dropout > 0)


class _Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Parameter(0.1 * torch.randn(6, 8))
        self.mix, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.first, self.last = nn.LayerNorm(8), nn.RMSNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.mix(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.last(x) @ self.tokens.weight.T


def gpt() -> Network:
    loss = lambda module, tokens: F.cross_entropy(module(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return _of(_Gpt(), torch.randint(11, (3, 6)), loss=loss)


class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, mode="mean"), nn.Linear(4, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(words)))


class _Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(8, 5), nn.Linear(9, 4)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        sent = F.elu(self.message(torch.cat([nodes[edges[0]], nodes[edges[1]]], 1)))
        gathered = nodes.new_zeros(len(nodes), 5).index_add(0, edges[1], sent)
        return self.update(torch.cat([nodes, gathered], 1))


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 4), nn.Parameter(0.3 * torch.randn(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        return torch.einsum("nk,nkij,nj->ni", weights, self.experts[chosen], x).tanh()


class _Spectral(nn.Module):
    """A Fourier layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(0.3 * torch.randn(4, 3, 2))
        self.local = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)[..., :4] * torch.view_as_complex(self.weights.transpose(0, 1).contiguous())
        return F.gelu(torch.fft.irfft(modes, n=x.shape[-1]) + self.local(x))


class _Warp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta, self.filter = nn.Parameter(torch.tensor([[1.1, 0.2, 0.03], [-0.1, 0.9, 0.07]])), nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.theta.expand(len(x), 2, 3), list(x.shape), align_corners=True)
        return self.filter(F.grid_sample(x, grid, align_corners=True)).tanh()


class _Gaussian(nn.Module):
    """Minus the log-likelihood of a Gaussian process."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([0.1, -0.2, -1.0]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        size, length, noise = self.log_scale.exp()
        kernel = size * torch.exp(-torch.cdist(x, x + 0.01).square() / (2 * length**2))
        factor = torch.linalg.cholesky((kernel + kernel.mT) / 2 + noise * torch.eye(len(x)).to(x))
        white = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
        return white.square().sum() / 2 + factor.diagonal().log().sum()


class _Autoencoder(nn.Module):
    """With a drawn code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_size = self.encoder(x).chunk(2, -1)
        code = mean + log_size.exp() * torch.randn_like(mean)
        divergence = (mean.square() + (2 * log_size).exp() - 2 * log_size).mean()
        return F.binary_cross_entropy_with_logits(self.decoder(code), torch.sigmoid(x)) + 0.1 * divergence


def pinn() -> Network:
    """A wave equation by nested derivatives."""
    widths = (2, 12, 12, 1)
    layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.Tanh())]

    def loss(module: nn.Module, points: Tensor) -> Tensor:
        x = points.detach().requires_grad_()
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        bends = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return (bends[0] - 4 * bends[1] + math.pi**2 * torch.sin(math.pi * x[:, 0])).square().mean()

    return _of(nn.Sequential(*layers[:-1]), torch.rand(20, 2), loss=loss)


def _own(value: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
    found: Tensor = value(x, *rest)
    return found


def ctc() -> Network:
    targets = torch.tensor([[1, 2, 2, 4], [3, 1, 4, 1]])
    loss = lambda module, x, t: F.ctc_loss(module(x).log_softmax(-1), t, [12, 11], [4, 3])
    return _of(nn.Linear(8, 5), torch.randn(12, 2, 8), targets, loss=loss)


def cosine() -> Network:
    loss = lambda module, x: F.huber_loss(F.cosine_similarity(module(x), x), torch.ones(len(x)).to(x), delta=0.3)
    return _of(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(6, 8), loss=loss)


def segmented() -> Network:
    loss = lambda module, x, labels: F.nll_loss(module(x).log_softmax(1), labels, ignore_index=-100)
    labels = torch.randint(3, (2, 6, 6))
    labels[0, 0] = -100
    return _of(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), torch.randn(2, 2, 6, 6), labels, loss=loss)


NETWORKS: dict[str, Callable[[], Network]] = {
    **{
        kind.__name__: _activated(kind)
        for kind in (
            nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.SELU, nn.Softplus, nn.LogSigmoid, nn.PReLU, nn.Hardswish,
        )
    },
    "batch norm": _normed(lambda: nn.BatchNorm2d(8)),
    "batch norm, evaluated": _normed(lambda: nn.BatchNorm2d(8), evaluated=True),
    "group norm": _normed(lambda: nn.GroupNorm(2, 8)),
    "instance norm": _normed(lambda: nn.InstanceNorm2d(8, affine=True)),
    "residual": residual,
    "depthwise and transposed convolutions": depthwise,
    "convolutions of volumes": volumes,
    "U-Net": unet,
    **{f"{kind.__name__}, two layers, both ways": recurrent(kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    **{f"{kind.__name__}, packed": packed(kind) for kind in (nn.LSTM, nn.GRU)},
    **{kind.__name__: cells(kind) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)},
    "attention": attention,
    "transformer layer": encoder(0.0),
    "transformer layer with dropout": encoder(0.2),
    "GPT": gpt,
    "dropout": lambda: _layers(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 2), drawn=True),
    "embedding bag": lambda: _of(_Bag(), torch.randint(9, (5, 3))),
    "graph": lambda: _of(_Graph(), torch.randn(7, 4), torch.randint(7, (2, 12))),
    "mixture of experts": lambda: _of(_Experts(), torch.randn(5, 6)),
    "Fourier layer": lambda: _of(_Spectral(), torch.randn(2, 3, 10)),
    "spatial transformer": lambda: _of(_Warp(), torch.randn(2, 2, 6, 6)),
    "Gaussian process": lambda: _of(_Gaussian(), torch.randn(6, 2), torch.randn(6), loss=_own),
    "variational autoencoder": lambda: _of(_Autoencoder(), torch.randn(5, 6), loss=_own, drawn=True),
    "weight norm": lambda: _layers(parametrizations.weight_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 2)),
    "orthogonal": lambda: _layers(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 2)),
    "physics-informed": pinn,
    "CTC loss": ctc,
    "cosine similarity, Huber loss": cosine,
    "segmentation": segmented,
}
"""By name; each call builds one anew, from the global generator."""
