"""Kernels of neural networks that modules reach only in part: their overloads, masks and outputs beside the first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import imstep

aten = torch.ops.aten


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _product(f, point: dict[str, Tensor], direction: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {k: t.clone().requires_grad_() for k, t in point.items()}
    gradients = torch.autograd.grad(f(leaves), list(leaves.values()), create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True))
    products = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, products, strict=True))


def _check(f, point: dict[str, Tensor], h: float | None = None) -> None:
    direction = {k: _random(*t.shape, seed=9) for k, t in point.items()}
    found, expected = imstep.hvp(f, point, direction, h=h), _product(f, point, direction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


MEAN, VARIANCE = 0.3 * _random(4, seed=4), _random(4, seed=5).exp()
BATCH_NORMS = {
    "native-training": lambda x, w, b, m, v: torch.native_batch_norm(x, w, b, m, v, True, 0.1, 1e-5),
    "native-evaluation": lambda x, w, b, m, v: torch.native_batch_norm(x, w, b, m, v, False, 0.1, 1e-5),
    "legit-training": lambda x, w, b, m, v: aten._native_batch_norm_legit(x, w, b, m, v, True, 0.1, 1e-5),
    "legit-evaluation": lambda x, w, b, m, v: aten._native_batch_norm_legit(x, w, b, m, v, False, 0.1, 1e-5),
    "no-statistics": lambda x, w, b, m, v: aten._native_batch_norm_legit(x, w, b, True, 0.1, 1e-5),
    "no-training": lambda x, w, b, m, v: aten._native_batch_norm_legit_no_training(x, w, b, m, v, 0.1, 1e-5),
    "with-update": lambda x, w, b, m, v: aten._batch_norm_with_update(x, w, b, m, v, 0.1, 1e-5),
    "no-update": lambda x, w, b, m, v: aten._batch_norm_no_update(x, w, b, m, v, 0.1, 1e-5),
}


@pytest.mark.parametrize("h", [None, 1e-20])
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm(name, h):
    weights = _random(6, 4, 5, seed=3)
    means = []

    def f(q):
        means.append(MEAN.clone())
        y = BATCH_NORMS[name](q["x"], q["w"], q["b"], means[-1], VARIANCE.clone())[0]
        return torch.tanh(weights * y).sum()

    _check(f, {"x": 2 + _random(6, 4, 5), "w": _random(4, seed=1), "b": _random(4, seed=2)}, h)
    torch.testing.assert_close(means[0], means[1])  # running statistics: from the real part, once


@pytest.mark.parametrize("given", ["x", "w", "b", "xw", "wb"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_few_perturbed_arguments(given, training):
    every = {"x": 2 + _random(6, 4, 5), "w": _random(4, seed=1), "b": _random(4, seed=2)}

    def f(q):
        q = {**every, **q}
        y = torch.native_batch_norm(q["x"], q["w"], q["b"], MEAN.clone(), VARIANCE.clone(), training, 0.1, 1e-5)[0]
        return torch.tanh(y).sum()

    _check(f, {k: every[k] for k in given})


@pytest.mark.parametrize("h", [None, 1e-20])
def test_statistics_of_normalisations_carry_derivatives(h):
    def f(q):
        layer = torch.native_layer_norm(q["x"], (4,), q["w"], q["b"], 1e-5)
        group = torch.native_group_norm(q["x"], q["b"], q["w"], 6, 4, 4, 2, 1e-5)
        return sum(torch.tanh(y).sum() for y in (*layer, *group))

    direction = {"x": _random(6, 4, 4, seed=9), "w": _random(4, seed=8), "b": _random(4, seed=7)}
    point = {"x": _random(6, 4, 4), "w": _random(4, seed=1), "b": _random(4, seed=2)}
    expected = torch.func.jvp(torch.func.grad(f), (point,), (direction,))[1]
    torch.testing.assert_close(imstep.hvp(f, point, direction, h=h), expected, rtol=1e-11, atol=1e-12)


CONVOLUTIONS = {
    "conv1d": (lambda x, w, b: torch.conv1d(x, w, b, 2, 1, 2), (2, 4, 9), (6, 4, 3)),
    "conv2d-grouped": (lambda x, w, b: torch.conv2d(x, w, b, 1, (1, 0), 1, 2), (2, 4, 5, 6), (6, 2, 3, 2)),
    "conv2d-depthwise": (lambda x, w, b: torch.conv2d(x, w, b, 1, 1, 1, 6), (2, 6, 5, 5), (6, 1, 3, 3)),
    "conv3d": (lambda x, w, b: torch.conv3d(x, w, b, 2), (2, 2, 4, 4, 5), (6, 2, 2, 2, 3)),
    "transposed1d": (lambda x, w, b: torch.conv_transpose1d(x, w, b, 2, 1, 1), (2, 4, 5), (4, 6, 3)),
    "transposed2d-grouped": (lambda x, w, b: torch.conv_transpose2d(x, w, b, 2, groups=2), (2, 4, 3, 3), (4, 3, 2, 2)),
    "transposed3d": (lambda x, w, b: torch.conv_transpose3d(x, w, b), (1, 2, 2, 3, 2), (2, 6, 2, 2, 2)),
    "unbatched": (lambda x, w, b: torch.conv2d(x, w, b), (4, 5, 5), (6, 4, 3, 3)),
    "time-first": (lambda x, w, b: torch.conv_tbc(x, w, b, 1), (7, 2, 4), (3, 4, 6)),
}


@pytest.mark.parametrize("h", [None, 1e-20])
@pytest.mark.parametrize("given", ["x", "w", "b", "xw", "xwb"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, given, h):
    convolve, x_shape, w_shape = CONVOLUTIONS[name]
    every = {"x": _random(*x_shape), "w": _random(*w_shape, seed=1), "b": _random(6, seed=2)}

    def f(q):
        q = {**every, **q}
        return torch.tanh(convolve(q["x"], q["w"], q["b"]) / 3).sum()

    _check(f, {k: every[k] for k in given}, h)


@pytest.mark.parametrize("train", [True, False])
def test_native_dropout_draws_one_mask(train):
    def f(q):
        torch.manual_seed(1)
        return torch.tanh(torch.native_dropout(q["x"] ** 2, 0.4, train)[0]).sum()

    _check(f, {"x": _random(50)})


@pytest.mark.parametrize("p", [0.0, 1.0, 1.5, 2.0, 3.0, float("inf")])
def test_distances(p):
    """Also between equal rows, where PyTorch takes the derivative as zero."""
    x = _random(5, 3)
    y = torch.cat([_random(3, 3, seed=1), x[:1]])
    direction = {"x": _random(5, 3, seed=8), "y": _random(4, 3, seed=9)}

    def f(q):
        return torch.tanh(torch.cdist(q["x"], q["y"], p)).sum() + torch.tanh(torch.pdist(q["x"], p)).sum()

    def gradient(t):
        leaves = {k: (v + t * direction[k]).requires_grad_() for k, v in {"x": x, "y": y}.items()}
        return torch.autograd.grad(f(leaves), list(leaves.values()), materialize_grads=True)

    apart = lambda q: torch.tanh(torch.cdist(q["x"], q["y"][:3], p)).sum() + torch.tanh(torch.pdist(q["x"], p)).sum()
    f, together = apart, f
    expected = [(a - b) / 2e-5 for a, b in zip(gradient(1e-5), gradient(-1e-5), strict=True)]
    found = imstep.hvp(f, {"x": x, "y": y}, direction)
    torch.testing.assert_close(list(found.values()), expected, atol=1e-6, rtol=1e-6)
    assert all(t.isfinite().all() for t in imstep.hvp(together, {"x": x, "y": y}, direction).values())
