"""Stand-ins for kernels without a second derivative: the originals' values and gradients, products by differences."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import imstep
from imstep.complexstep import substitutes


def _central_difference(f, x, v, h=1e-5):
    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(f(at), at)[0]

    return (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)


def _case_grid(dims, mode, padding, align):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *(5, 4, 3)[:dims], dtype=torch.float64)
    grid = 1.5 * torch.randn(2, *(3, 4, 2)[:dims], dims, dtype=torch.float64)
    return x, grid


_GRIDS = [
    (dims, mode, padding, align)
    for dims, mode, padding, align in product((2, 3), (0, 1, 2), (0, 1, 2), (False, True))
    if not (dims == 3 and mode == 2)
]


@pytest.mark.parametrize(("dims", "mode", "padding", "align"), _GRIDS)
def test_grid_sampler_is_the_original(dims, mode, padding, align):
    x, grid = (t.requires_grad_() for t in _case_grid(dims, mode, padding, align))
    original = torch.grid_sampler(x, grid, mode, padding, align)
    ours = substitutes.grid_sampler(x, grid, mode, padding, align)
    torch.testing.assert_close(ours, original)
    weights = torch.randn_like(original)
    expected = torch.autograd.grad(original, (x, grid), weights)
    found = torch.autograd.grad(ours, (x, grid), weights, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_grid_sample_product(dims, mode):
    if dims == 3 and mode == "bicubic":
        pytest.skip("PyTorch has no bicubic sampling of volumes")
    x, grid = _case_grid(dims, mode, 0, False)
    join = lambda a, b: torch.cat([a.reshape(-1), b.reshape(-1)])

    def f(z):
        a, b = z[: x.numel()].view(x.shape), z[x.numel() :].view(grid.shape)
        return F.grid_sample(a, b, mode=mode, align_corners=False).tanh().sum()

    z = join(x, grid)
    v = torch.randn_like(z)
    torch.testing.assert_close(imstep.hvp(f, z, v), _central_difference(f, z, v), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("zero_infinity", [True, False])
def test_ctc_loss_is_the_original(reduction, padded, zero_infinity):
    torch.manual_seed(0)
    logits = torch.randn(12, 3, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 1, 7])  # the last needs more time than it has: an infinite loss
    targets = torch.randint(1, 5, (3, 7) if padded else (12,))
    targets[..., 1] = targets[..., 0]
    times = torch.tensor([12, 9, 6])
    results = []
    for loss in (torch.ctc_loss, substitutes.ctc_sum):
        code = {"none": 0, "mean": 1, "sum": 2}[reduction]
        results.append(loss(logits.log_softmax(2), targets, times, lengths, 0, code, zero_infinity))
    torch.testing.assert_close(results[1], results[0])
    if zero_infinity:
        found, expected = (torch.autograd.grad(r.sum(), logits)[0] for r in results[::-1])
        torch.testing.assert_close(found, expected)


def test_ctc_loss_product():
    torch.manual_seed(0)
    logits, v = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    targets = torch.randint(1, 5, (3, 4))

    def f(z):
        return F.ctc_loss(z.log_softmax(2), targets, [12, 9, 11], [4, 1, 3])

    torch.testing.assert_close(imstep.hvp(f, logits, v), _central_difference(f, logits, v), atol=1e-8, rtol=1e-6)


def test_max_pool1d_keeps_the_imaginary_part_without_gradients():
    torch.manual_seed(0)
    x, v = torch.randn(2, 2, 3, 9, dtype=torch.float64)
    with torch.no_grad():
        value, tangent = imstep.jvp(lambda t: F.max_pool1d(t, 3), x, v)
    expected = torch.func.jvp(lambda t: F.max_pool2d(t, (1, 3)), (x,), (v,))
    torch.testing.assert_close((value, tangent), expected)
