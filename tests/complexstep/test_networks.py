"""Whole networks: Hessian products of their losses against double backward, in both arithmetics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import imstep
from imstep.complexstep.arithmetic import Arithmetic
from imstep.complexstep.tape import Tape


class _Residual(nn.Module):
    """A block as in ResNet, with activations and sums that overwrite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x
        return self.relu(y)


class _Block(nn.Module):
    """A transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.mix(self.norm1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class _GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 16), nn.Embedding(7, 16)
        self.blocks = nn.Sequential(_Block(16, 2), _Block(16, 4))
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.norm(self.blocks(x)) @ self.tokens.weight.T  # tied weights


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(3, 5, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.out(self.recurrent(x)[0])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)[0])


@dataclass(frozen=True)
class Network:
    """A network and its loss: ``loss(call, dtype)``, where ``call`` evaluates the network."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[Callable[..., Tensor], torch.dtype], Tensor]
    training: bool = True


def _data(*shape: int, dtype: torch.dtype, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _labels(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(8))


def _classified(*shape: int, classes: int = 4) -> Callable[..., Tensor]:
    def loss(call: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        return F.cross_entropy(call(_data(*shape, dtype=dtype)), _labels(shape[0], classes=classes))

    return loss


def _reconstructed(*shape: int) -> Callable[..., Tensor]:
    def loss(call: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        x = torch.sigmoid(_data(*shape, dtype=dtype))
        return F.binary_cross_entropy_with_logits(call(x), x)

    return loss


def _pinn_loss(call: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    x = _data(12, 2, dtype=dtype).requires_grad_()
    u = call(x)
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)[0][:, :1]
    return F.mse_loss(slope[:, 1:] - 0.1 * second, u**3 - u)


def _language_loss(call: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    ids = _labels(3, 7, classes=11)
    return F.cross_entropy(call(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _packed_loss(call: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    return call(_data(4, 6, 3, dtype=dtype), torch.tensor([3, 6, 1, 5])).pow(2).mean()


def _sequence_loss(call: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    return call(_data(4, 6, 3, dtype=dtype)).pow(2).mean()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4))


def _pinn() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.2)),
        *(nn.Conv2d(6, 8, 3, stride=2, groups=2), nn.GroupNorm(2, 8), nn.ELU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 4)),
    )


def _conv_autoencoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(4, 6, 3, stride=2, padding=1)),
        *(nn.Softplus(), nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), nn.LayerNorm([4, 4, 4]), nn.GELU()),
        nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1),
    )


def _resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), _Residual(6), nn.AvgPool2d(2), _Residual(6), nn.Flatten(), nn.Linear(96, 4)
    )


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))


NETWORKS = [
    Network("mlp", _mlp, _classified(9, 5)),
    Network("cnn-train", _cnn, _classified(6, 3, 8, 8)),
    Network("cnn-eval", _cnn, _classified(6, 3, 8, 8), training=False),
    Network("conv-autoencoder", _conv_autoencoder, _reconstructed(4, 1, 8, 8)),
    Network("resnet-train", _resnet, _classified(5, 3, 8, 8)),
    Network("resnet-eval", _resnet, _classified(5, 3, 8, 8), training=False),
    Network("gpt", _GPT, _language_loss),
    Network("transformer", _transformer, _sequence_loss),
    Network("lstm", lambda: _Recurrent(nn.LSTM), _sequence_loss),
    Network("gru", lambda: _Recurrent(nn.GRU), _sequence_loss),
    Network("gru-packed", lambda: _Recurrent(nn.GRU), _packed_loss),
    Network("rnn", lambda: _Recurrent(nn.RNN), _sequence_loss),
    Network("pinn", _pinn, _pinn_loss),
]


class _Subject:
    """A network at a point, its loss as a function of the parameters, and a direction."""

    def __init__(self, network: Network, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.network, self.dtype = network, dtype
        self.module = network.build().double().to(dtype).train(network.training)
        self.buffers = copy.deepcopy(dict(self.module.named_buffers()))
        self.point = {k: p.detach().clone() for k, p in self.module.named_parameters()}
        self.direction = {k: _data(*p.shape, dtype=dtype, seed=i) for i, (k, p) in enumerate(self.point.items())}

    def __call__(self, parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(1)
        self.buffers_after = copy.deepcopy(self.buffers)
        call = lambda *args: functional_call(self.module, {**parameters, **self.buffers_after}, args)
        return self.network.loss(call, self.dtype)

    def double_backward(self) -> Tensor:
        leaves = {k: t.clone().requires_grad_() for k, t in self.point.items()}
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            gradients = torch.autograd.grad(self(leaves), list(leaves.values()), create_graph=True)
            slope = sum((g * d).sum() for g, d in zip(gradients, self.direction.values(), strict=True))
            return _flat(torch.autograd.grad(slope, list(leaves.values())))

    def product(self, h: float | None = None) -> Tensor:
        return _flat(imstep.hvp(self, self.point, self.direction, h=h).values())


def _flat(tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


by_name = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)


@by_name
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_product_is_double_backward(network, dtype, tolerance):
    subject = _Subject(network, dtype)
    expected = subject.double_backward()
    running = subject.buffers_after
    assert _relative(subject.product(), expected) < tolerance
    for name, buffer in subject.buffers_after.items():  # running statistics: updated once, from the real part
        torch.testing.assert_close(buffer, running[name])


@by_name
def test_replays_agree_with_products(network):
    subject = _Subject(network, torch.float64)
    tape = Tape()
    arithmetic = Arithmetic(tape=tape)
    leaves = {k: t.clone().requires_grad_() for k, t in subject.point.items()}
    for t in leaves.values():
        arithmetic.attach(t)
    with arithmetic:
        arithmetic.finish(arithmetic.gradient(subject(leaves), list(leaves.values())))
    directions = [torch.stack([d, d.flip(0) + 1]) for d in subject.direction.values()]
    with torch.no_grad():
        first = tape.replay([d[0] for d in directions])
        second = tape.replay([d[1] for d in directions])
        both = torch.vmap(tape.replay)(directions)
    assert _relative(_flat(first), subject.product()) < 1e-13
    assert _relative(_flat(b[0] for b in both), _flat(first)) < 1e-12
    assert _relative(_flat(b[1] for b in both), _flat(second)) < 1e-12


@by_name
@pytest.mark.parametrize(("h", "tolerance"), [(1e-20, 1e-12), (1e-3, 1e-1)])
def test_finite_step(network, h, tolerance):
    subject = _Subject(network, torch.float64)
    assert _relative(subject.product(h), subject.double_backward()) < tolerance


@pytest.mark.parametrize("name", ["mlp", "cnn-eval", "pinn"])
def test_finite_step_is_second_order(name):
    network = next(n for n in NETWORKS if n.name == name)
    subject = _Subject(network, torch.float64)
    expected = subject.double_backward()
    errors = [_relative(subject.product(h), expected) for h in (4e-4, 2e-4)]
    assert 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "resnet-train", "conv-autoencoder", "gpt", "lstm"])
def test_half_precision_parameters(name, dtype):
    network = next(n for n in NETWORKS if n.name == name)
    found, expected = _Subject(network, dtype).product(), _Subject(network, torch.float32).product()
    assert found.dtype is dtype
    assert _relative(found, expected) < 0.15


@pytest.mark.parametrize("name", ["mlp", "cnn-train", "gpt"])
def test_autocast(name):
    network = next(n for n in NETWORKS if n.name == name)
    subject = _Subject(network, torch.float32)
    exact = subject.product()
    with torch.autocast("cpu", torch.bfloat16):
        found = subject.product()
    assert found.dtype is torch.float32
    assert 0 < _relative(found, exact) < 0.15
