"""Derivatives of derivatives: third derivatives against three backward passes, and what cannot be nested."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import imstep
from imstep.complexstep import ComplexStepError

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, LABELS, IMAGES, SEQUENCES = normal(7, 4), torch.arange(7) % 3, normal(7, 1, 6, 6), normal(7, 5, 4)


def by_three_backwards(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    (product,) = torch.autograd.grad(gradient @ v, x, create_graph=True)
    return torch.autograd.grad(product @ w, x)[0]


class OnVector:
    """A loss of a model as a function of one vector of all its parameters."""

    def __init__(self, model: nn.Module, loss: Callable[[Callable[..., Tensor]], Tensor], seed: int = 0) -> None:
        self.model, self.loss = model.double(), loss
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        size = sum(shape.numel() for shape in self.shapes.values())
        self.at, self.v, self.w = 0.5 * normal(size, seed=seed), normal(size, seed=1), normal(size, seed=2)

    def __call__(self, vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        named = {name: t.view(shape) for t, (name, shape) in zip(parts, self.shapes.items(), strict=True)}
        return self.loss(lambda *args: functional_call(self.model, named, args))


class Last(nn.Module):
    """The outputs of a recurrent network at the end of a sequence."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0][:, -1]


class Normalised(nn.Module):
    """Layer normalisation, written out: the triple backward of PyTorch's own is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3))


def classified(net: Callable[..., Tensor]) -> Tensor:
    return F.cross_entropy(net(X), LABELS)


def residual(net: Callable[..., Tensor]) -> Tensor:
    """u'' + sin u at points of a line: derivatives of the model inside the loss."""
    x = torch.linspace(0, 1, 9, dtype=F64)[:, None].requires_grad_()
    u = net(x)
    for _ in range(2):
        (u,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return ((u + net(x).sin()) ** 2).mean()


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))


LOSSES = {
    "cross entropy": OnVector(mlp(nn.Tanh()), classified),
    "squares": OnVector(mlp(nn.SiLU()), lambda net: F.mse_loss(net(X), X[:, 1:])),
    "softmax": OnVector(mlp(nn.Sigmoid()), lambda net: (F.softmax(net(X), -1) ** 2).sum()),
    "logistic": OnVector(mlp(nn.ELU()), lambda net: F.binary_cross_entropy_with_logits(net(X), X[:, 1:].sigmoid())),
    "convolution": OnVector(convolution(), lambda net: F.cross_entropy(net(IMAGES), LABELS)),
    "LSTM": OnVector(Last(nn.LSTM), lambda net: F.cross_entropy(net(SEQUENCES), LABELS)),
    "GRU": OnVector(Last(nn.GRU), lambda net: F.cross_entropy(net(SEQUENCES), LABELS)),
    "derivatives inside": OnVector(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)), residual),
    "checkpoint": OnVector(mlp(nn.Tanh()), lambda net: classified(lambda x: checkpoint(net, x, use_reentrant=False))),
    "in place": OnVector(mlp(nn.ELU(inplace=True)), lambda net: net(X).mul_(2).tanh_().pow(3).sum()),
    "factorisation": OnVector(
        nn.Linear(4, 4, bias=False), lambda net: torch.linalg.cholesky(net(X).T @ net(X)).diagonal().log().sum()
    ),
    "fourier": OnVector(nn.Linear(4, 4), lambda net: torch.fft.ifft(net(X).tanh()).abs().pow(3).sum()),
    "single precision inside": OnVector(nn.Linear(4, 3), lambda net: net(X).tanh().double().float().double().sum()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_third_derivatives_are_those_of_three_backward_passes(name):
    f = LOSSES[name]
    found = imstep.third_derivative(f, f.at, f.v, f.w)
    tolerance = 1e-5 if name.startswith("single") else 1e-12
    expected = by_three_backwards(f, f.at, f.v, f.w)
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    assert float(expected.norm()) > 1e-3


def test_normalisation_layers_are_those_written_out():
    layers = lambda norm: nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3))
    written = OnVector(layers(Normalised()), classified)
    fused = OnVector(layers(nn.LayerNorm(5, elementwise_affine=False)), classified)
    expected = by_three_backwards(written, written.at, written.v, written.w)
    found = imstep.third_derivative(fused, fused.at, fused.v, fused.w)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_pytrees_and_a_closed_form():
    a, b, v, w = (normal(3, seed=s) for s in range(4))
    zero = torch.zeros(3, dtype=F64)
    f = lambda t: (t["a"] ** 2 * t["b"][0]).sum()
    found = imstep.third_derivative(f, {"a": a, "b": (b,)}, {"a": v, "b": (zero,)}, {"a": w, "b": (zero,)})
    torch.testing.assert_close(found["a"], zero)
    torch.testing.assert_close(found["b"][0], 2 * v * w)


def test_the_second_direction_is_the_first_if_left_out():
    x, v = normal(3), normal(3, seed=1)
    found = imstep.third_derivative(lambda t: (t**4).sum(), x, v)
    torch.testing.assert_close(found, 24 * x * v * v, rtol=1e-14, atol=0)


def test_forward_nests_to_any_depth():
    x, v, w = normal(3), normal(3, seed=1), normal(3, seed=2)
    second = lambda at: imstep.jvp(lambda t: t**5, (at,), (v,))[1]
    third = lambda at: imstep.jvp(second, (at,), (v,))[1]
    value, found = imstep.jvp(third, (x,), (w,))
    torch.testing.assert_close(value, 20 * x**3 * v * v, rtol=1e-13, atol=0)
    torch.testing.assert_close(found, 60 * x**2 * v * v * w, rtol=1e-13, atol=0)


def test_a_direction_may_depend_on_the_point():
    x, w = normal(3), normal(3, seed=2)
    found = imstep.jvp(lambda t: imstep.hvp(lambda s: (s**4).sum(), t, t), (x,), (w,))[1]  # of 12 x³
    torch.testing.assert_close(found, 36 * x * x * w, rtol=1e-13, atol=0)


def test_finite_arithmetic_nests():
    x, v, w = normal(3), normal(3, seed=1), normal(3, seed=2)
    f = lambda t: torch.tanh(t).pow(3).sum()
    found = imstep.jvp(lambda t: imstep.hvp(f, t, v, h=1e-20), (x,), (w,))[1]
    torch.testing.assert_close(found, by_three_backwards(f, x, v, w), rtol=1e-12, atol=1e-14)


def test_derivatives_of_constants_may_be_part_of_a_loss():
    x, v, w = normal(3), normal(3, seed=1), normal(3, seed=2)
    f = lambda t: (t**4).sum()

    def without_graph(t):
        with torch.no_grad():
            return imstep.hvp(f, t, v)

    expected = 24 * x**2 * v * w
    for weights in (without_graph, lambda t: imstep.hvp(f, x, v)):
        loss = lambda t, weights=weights: (weights(t) * t * t).sum()
        torch.testing.assert_close(imstep.hvp(loss, x, w), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "inner",
    [
        lambda t, v: imstep.hvp(lambda s: (s**4).sum(), t, v).sum(),
        lambda t, v: imstep.jvp(lambda s: (s**4).sum(), (t,), (v,))[1],
        lambda t, v: imstep.jvp(lambda s: (s * t.exp()).sum() ** 2, (v,), (v,))[1],
        lambda t, v: imstep.hvp(lambda s: (s * t).sum() ** 2, v, v).sum(),
        lambda t, v: imstep.jvp(lambda s: (s**2).sum(), (v,), (t * t,))[1],
    ],
    ids=["hvp", "jvp", "jvp of a closure", "hvp of a closure", "direction"],
)
def test_a_gradient_through_a_derivative_is_refused(inner):
    x, v = normal(3), normal(3, seed=1)
    with pytest.raises(ComplexStepError, match="create_graph=True"):
        imstep.hvp(lambda t: inner(t, v), x, v)
    parameter = nn.Parameter(x)
    with pytest.raises(ComplexStepError, match="create_graph=True"):
        imstep.Hessian(lambda: inner(parameter, v) + parameter.sum(), [parameter])


def test_structures_must_agree():
    x = normal(3)
    with pytest.raises(ValueError, match="agree"):
        imstep.third_derivative(lambda t: t.sum(), x, x, normal(4))
