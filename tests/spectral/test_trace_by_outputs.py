"""Traces sampled at the outputs of layers, beside Hessians by double backward and matrices written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from spectral_cases import F64, seeded
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import imstep
from imstep import spectral
from imstep.spectral import parts

X, IMAGES = torch.randn(12, 5, generator=seeded(1), dtype=F64), torch.randn(6, 4, 6, 6, generator=seeded(2), dtype=F64)
LABELS, TOKENS = torch.arange(12) % 3, torch.randint(7, (4, 5), generator=seeded(3))
cross = F.cross_entropy


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch):
    monkeypatch.setattr(parts, "_LEAST", 17)


def mlp(activation=nn.Tanh, width=6, ends=(5, 3)):
    return nn.Sequential(nn.Linear(ends[0], width), activation(), nn.Linear(width, ends[1]))


def images(training):
    norm = nn.BatchNorm2d(4, track_running_stats=not training)
    layers = [nn.Conv2d(4, 4, 3, 2, 1, groups=2), norm, nn.Tanh(), nn.Conv2d(4, 2, 2, dilation=2, bias=False)]
    return nn.Sequential(*layers, nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(2, 3)).train(training)


class Transformer(nn.Module):
    def __init__(self, tied=False, looked_up=False):
        super().__init__()
        self.tokens, self.positions, self.looked_up = nn.Embedding(7, 4), nn.Embedding(5, 4), looked_up
        self.norm, self.qkv, self.end = nn.LayerNorm(4), nn.Linear(4, 12), nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens)
        x = x + (self.positions(torch.arange(5)) if self.looked_up else self.positions.weight[:5])
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.gelu(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(self.end(x)).flatten(0, 1)


class Reused(nn.Module):
    """A weight in two places, and one that is doubled before it is used."""

    def __init__(self):
        super().__init__()
        self.twice, self.doubled = (nn.Parameter(torch.randn(5, 5) / 2) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(F.linear(torch.tanh(F.linear(x, self.twice)), self.twice))
        return self.head(torch.tanh(F.linear(x, self.doubled * 2)))


class Sliced(nn.Module):
    """Slices of one weight in several layers, and a scale."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(11, 5) / 2), nn.Parameter(torch.randn(5))

    def forward(self, x):
        first, second = self.weight.split([8, 3])
        return torch.tanh(F.linear(x * self.scale, first))[:, :5] @ second.mT


class Curved(nn.Module):
    """Parameters that are broadcast, and that outputs are no linear functions of."""

    def __init__(self):
        super().__init__()
        self.below, self.power = nn.Parameter(torch.ones(5) + 0.5), nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.pow(x.abs(), self.power) / self.below)


class Rounded(torch.autograd.Function):
    """A value whose backward pass is another function's."""

    @staticmethod
    def forward(ctx, x):
        return torch.sin(3 * x)

    @staticmethod
    def backward(ctx, g):
        return 0.5 * g


class StraightThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(Rounded.apply(torch.tanh(self.first(x))))


class TimeFirst(nn.Module):
    """Examples along the second dimension, times mixed; and PyTorch's own attention, which turns them round."""

    def __init__(self):
        super().__init__()
        self.start, self.norm, self.head = nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = torch.tanh(self.norm(self.start(x)))
        x = x + self.attention(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1)
        return self.head(x).mean(0)


def on(data, targets, loss=cross):
    return lambda model: loss(model(data), targets)


def contrast(model):
    z = model(X)
    return torch.logsumexp(z @ z.mT, 1).mean()


CASES = {
    "mlp": (lambda: mlp(), on(X, LABELS), 12, ()),
    "wide end": (lambda: mlp(ends=(5, 40)), on(X, torch.zeros(12, 40, dtype=F64), F.mse_loss), 12, ()),
    "as many examples as channels": (lambda: mlp(width=12, ends=(5, 12)), on(X, X @ X.mT, F.smooth_l1_loss), 12, ()),
    "convolutions": (lambda: images(False), on(IMAGES, LABELS[:6]), 6, ()),
    "batch statistics": (lambda: images(True), on(IMAGES, LABELS[:6]), 6, ("0.weight", "0.bias")),
    "batch statistics at the end": (
        lambda: nn.Sequential(mlp(), nn.BatchNorm1d(3, track_running_stats=False)), on(X, LABELS), 1, ()
    ),
    "transformer": (lambda: Transformer(), on(TOKENS, TOKENS.flatten()), 4, ()),
    "positions looked up": (
        lambda: Transformer(looked_up=True), on(TOKENS, TOKENS.flatten()), 4, ("positions.weight",)
    ),
    "tied": (lambda: Transformer(True), on(TOKENS, TOKENS.flatten()), 4, ("tokens.weight",)),
    "time first": (TimeFirst, on(X.reshape(2, 6, 5), LABELS[:6]), 6, ()),
    "reused": (Reused, on(X, LABELS), 12, ("twice", "doubled")),
    "sliced": (Sliced, on(X, LABELS), 12, ("weight",)),
    "examples coupled by the loss": (lambda: mlp(), contrast, 1, ()),
}


def built(name):
    torch.manual_seed(0)
    make, loss, examples, others = CASES[name]
    model = make().double()
    return model, (lambda: loss(model)), loss, examples, others


def true_traces(model, loss):
    """Of each parameter's block, by double backward."""
    names = {name: p.detach() for name, p in model.named_parameters()}

    def value(own, name):
        return loss(lambda *inputs: functional_call(model, {**names, name: own}, inputs, tie_weights=True))

    found = {}
    for name, p in names.items():
        with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            block = hessian(lambda own, name=name: value(own, name), p)
        found[name] = float(block.reshape(p.numel(), p.numel()).trace())
    return found


@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_traces_of_all_parameters_as_means(name):
    model, closure, loss, examples, others = built(name)
    H = imstep.Hessian(closure, model)
    parts, generator = H.trace_parts(), seeded()
    assert parts.parts == examples
    assert [n for n, covered in zip(H.parameters.names, parts.covered, strict=True) if not covered] == list(others)
    samples = torch.stack([parts.sample(generator).sum(0) for _ in range(40)])
    error = samples.std(0) / math.sqrt(40)
    for at, (own, true) in enumerate(true_traces(model, loss).items()):
        if own not in others:
            found = float(samples[:, at].mean() + parts.exact[at])
            assert abs(found - true) <= 4.5 * float(error[at]) + 1e-12 + 1e-9 * abs(true), own


@pytest.mark.parametrize("name", ["convolutions", "reused", "examples coupled by the loss"])
def test_the_trace_is_right_whatever_is_covered(name):
    model, closure, loss, *_ = built(name)
    H, traces = imstep.Hessian(closure, model), true_traces(model, loss)
    true = sum(traces.values())
    found = spectral.trace(H, rtol=0.05, seed=1)
    assert found.converged
    assert abs(found.value - true) <= 2 * found.error + 1e-12
    layers = spectral.trace(H, rtol=0.05, by="parameter", atol=0.05 * abs(true))
    assert layers.keys() == traces.keys()
    for own, estimate in layers.items():
        assert abs(estimate.value - traces[own]) <= 2.5 * estimate.error + 1e-12


def test_parameters_with_a_curvature_of_their_own_are_left_to_products():
    torch.manual_seed(0)
    model = Curved().double()
    H = imstep.Hessian(lambda: cross(model(X), LABELS), model)
    assert H.trace_parts().covered == [False, False, True, True]
    assert spectral.trace(H, rtol=0.01).value == pytest.approx(float(H.to_dense().trace()), rel=0.02)


def test_backward_passes_of_their_own_making_are_no_transposes():
    torch.manual_seed(0)
    model = StraightThrough().double()
    H = imstep.Hessian(lambda: cross(model(X), LABELS), model)
    parts, generator = H.trace_parts(), seeded()
    assert not parts.exact.any()
    samples = torch.stack([parts.sample(generator).sum() for _ in range(100)])
    assert abs(samples.mean() - H.to_dense().trace()) < 4 * samples.std() / 10


def autoencoder(dtype=F64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(34, 8), nn.Tanh(), nn.Linear(8, 34)).to(dtype)
    x = torch.rand(64, 34, generator=seeded(4), dtype=F64).to(dtype)
    return model, x


def test_errors_cover_the_truth_and_products_are_few():
    model, x = autoencoder()
    for H, seeds in (
        (imstep.Hessian(lambda: F.mse_loss(model(x), x), model), 20),
        (imstep.GaussNewton(lambda: (model(x), x), model), 5),
    ):
        true = float(H.to_dense().diag().sum())
        found = [spectral.trace(H, rtol=0.02, seed=seed) for seed in range(seeds)]
        assert all(one.converged and one.products <= 40 for one in found)
        assert sum(abs(one.value - true) <= one.error for one in found) >= 0.8 * seeds
        assert max(abs(one.value - true) for one in found) < 0.05 * true


def test_piecewise_linear_networks_take_no_noise():
    torch.manual_seed(0)
    model = mlp(nn.ReLU, 30).double()
    H = imstep.Hessian(lambda: cross(model(X), LABELS), model)
    found = spectral.trace(H, rtol=1e-6)
    assert found.products < 20
    assert found.value == pytest.approx(float(H.to_dense().diag().sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_over_batches_of_both_signs_and_zero(dtype):
    model, x = autoencoder(dtype)
    batches = [x[:40], x[40:]]
    for factor in (1.0, -1.0):
        H = imstep.Hessian.over(batches, lambda b, c=factor: c * F.mse_loss(model(b), b), model)
        whole = imstep.Hessian(lambda: F.mse_loss(model(x), x), model)
        found, other = spectral.trace(H, rtol=0.01), spectral.trace(whole, rtol=0.01, seed=5)
        assert found.converged
        assert found.value * factor == pytest.approx(other.value, rel=0.02)
        assert found.products < 100
    linear = imstep.Hessian(lambda: nn.ReLU()(x @ model[0].weight.mT).sum(), model[0])
    assert spectral.trace(linear) == spectral.Estimate(0.0, 0.0, spectral.trace(linear).products, True)


def test_hooks_on_parameters_and_weight_decay_are_seen():
    model, x = autoencoder()
    decayed = lambda: F.mse_loss(model(x), x) + 0.1 * model[0].weight.square().sum()
    H = imstep.Hessian(decayed, model)
    assert spectral.trace(H, rtol=0.01).value == pytest.approx(float(H.to_dense().trace()), rel=0.02)
    handle = model[0].weight.register_hook(lambda g: 3 * g)
    H = imstep.Hessian(lambda: F.mse_loss(model(x), x), model)
    assert H.trace_parts() is None
    handle.remove()


def test_the_same_seed_gives_the_same_numbers_and_limits_hold():
    model, x = autoencoder()
    H = imstep.Hessian(lambda: F.mse_loss(model(x), x), model)
    one, again, generated = (
        spectral.trace(H, rtol=0.01, seed=3),
        spectral.trace(H, rtol=0.01, seed=3),
        spectral.trace(H, rtol=0.01, generator=seeded(3)),
    )
    assert one == again == generated != spectral.trace(H, rtol=0.01, seed=4)
    short = spectral.trace(H, rtol=1e-4, max_products=120)
    assert not short.converged
    assert short.products <= 121
    assert abs(short.value - one.value) < 3 * (short.error + one.error)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="new point"):
        spectral.trace(H)
