"""Properties of Hessian products that hold for every network, on random networks drawn from a grammar of layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import imstep
from imstep.curvature import FrozenClosure, ParameterVector

BATCH = 6
ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus, nn.ReLU, nn.LeakyReLU)


class Residual(nn.Module):
    """x + f(x), written in place as users do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x).clone()
        out += x
        return out


def dense_block(draw: st.DrawFn, width: int) -> tuple[list[nn.Module], int]:
    kind = draw(st.sampled_from(["linear", "activation", "norm", "residual", "dropout", "softmax"]))
    if kind == "linear":
        wider = draw(st.integers(2, 6))
        return [nn.Linear(width, wider, bias=draw(st.booleans()))], wider
    if kind == "activation":
        return [draw(st.sampled_from(ACTIVATIONS))()], width
    if kind == "norm":
        return [draw(st.sampled_from([nn.LayerNorm, nn.BatchNorm1d]))(width)], width
    if kind == "residual":
        return [Residual(nn.Sequential(nn.Linear(width, width), nn.Tanh()))], width
    return [nn.Dropout(0.3) if kind == "dropout" else nn.Softmax(dim=1)], width


def image_block(draw: st.DrawFn, channels: int) -> tuple[list[nn.Module], int]:
    kind = draw(st.sampled_from(["conv", "activation", "norm", "residual"]))
    if kind == "conv":
        wider = draw(st.integers(1, 3))
        return [nn.Conv2d(channels, wider, draw(st.sampled_from([1, 3])), padding=1)], wider
    if kind == "activation":
        return [draw(st.sampled_from(ACTIVATIONS))()], channels
    if kind == "norm":
        return [draw(st.sampled_from([nn.BatchNorm2d(channels), nn.GroupNorm(1, channels)]))], channels
    return [Residual(nn.Conv2d(channels, channels, 3, padding=1))], channels


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Tensor, str]:
    """A model in float64, inputs, class labels and the name of a loss."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        inputs, channels = torch.randn(BATCH, 2, 5, 5), 2
        for _ in range(draw(st.integers(0, 2))):
            block, channels = image_block(draw, channels)
            layers += block
        pool = draw(st.sampled_from([nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2)]))
        layers += [pool, nn.Flatten()]
        width = 4 * channels
    else:
        width = draw(st.integers(2, 5))
        inputs = torch.randn(BATCH, width)
    layers.append(nn.Linear(width, 4))
    width = 4
    for _ in range(draw(st.integers(1, 4))):
        block, width = dense_block(draw, width)
        layers += block
    layers.append(nn.Linear(width, 3))
    loss = draw(st.sampled_from(["mse", "cross_entropy", "huber"]))
    return nn.Sequential(*layers).double(), inputs.double(), torch.randint(0, 3, (BATCH,)), loss


def closure_of(network: tuple[nn.Module, Tensor, Tensor, str]):
    model, inputs, labels, loss = network
    if loss == "cross_entropy":
        return lambda: F.cross_entropy(model(inputs), labels)
    target = F.one_hot(labels, 3).double()
    function = F.mse_loss if loss == "mse" else F.huber_loss
    return lambda: function(model(inputs), target)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    scale = max(float(a.norm()), float(b.norm()), 1e-8)
    return float((a - b).norm()) <= tolerance * scale


common = settings(max_examples=25, deadline=None)


@common
@given(networks(), st.integers(0, 1000), st.floats(-3, 3))
def test_products_are_linear_and_symmetric(network, seed: int, factor: float) -> None:
    H = imstep.Hessian(closure_of(network), network[0])
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(H.size, dtype=H.dtype, generator=generator) for _ in range(2))
    Hu, Hv = H @ u, H @ v
    assert close(H @ (factor * u + v), factor * Hu + Hv)
    bound = 1e-10 * float(u.norm() * Hv.norm() + v.norm() * Hu.norm()) + 1e-14
    assert abs(float(u @ Hv - v @ Hu)) <= bound


@common
@given(networks(), st.integers(0, 1000))
def test_block_equals_single_products(network, seed: int) -> None:
    H = imstep.Hessian(closure_of(network), network[0])
    V = torch.randn(H.size, 3, dtype=H.dtype, generator=torch.Generator().manual_seed(seed))
    assert close(H @ V, torch.stack([H @ v for v in V.unbind(1)], dim=1))


@common
@given(networks(), st.integers(0, 1000))
def test_replay_fresh_and_finite_steps_agree(network, seed: int) -> None:
    closure, parameters = closure_of(network), ParameterVector(network[0])
    frozen = FrozenClosure(closure, parameters)
    v = torch.randn(parameters.size, dtype=parameters.dtype, generator=torch.Generator().manual_seed(seed))
    point = frozen.linearise()
    replayed = parameters.flatten(point.tape.replay(parameters.unflatten(v)))
    assert close(replayed, frozen.product(v))
    assert close(replayed, frozen.product(v, h=1e-20), 1e-9)
    assert close(replayed, frozen.product(v, h=1e-150), 1e-9)
