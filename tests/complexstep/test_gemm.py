"""Matrix products by oneDNN: where they are chosen, and that they are the same products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import imstep
from imstep.complexstep import gemm
from imstep.complexstep.gemm import multiply, multiply_onto, pays
from imstep.complexstep.rules.blocks import product

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A processor on which oneDNN is the faster one, whatever this one is."""
    monkeypatch.setattr(gemm, "WIDE", True)


LAYOUTS = {
    "rows": lambda m, n: torch.randn(m, n),
    "columns": lambda m, n: torch.randn(n, m).t(),
    "part": lambda m, n: torch.randn(m + 3, n + 5)[1 : m + 1, 2 : n + 2],
    "strided": lambda m, n: torch.randn(2 * m, 2 * n)[::2, ::2],
    "one row for all": lambda m, n: torch.randn(1, n).expand(m, n),
}


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_products_of_all_layouts(left, right):
    torch.manual_seed(0)
    for m, k, n in ((128, 96, 160), (7, 5, 3)):
        a, b, c = LAYOUTS[left](m, k), LAYOUTS[right](k, n), torch.randn(m, n)
        expected = a.double() @ b.double()
        _close(multiply(a, b), expected)
        expected += c.double()
        assert multiply_onto(c, a, b) is c
        _close(c, expected)


@onednn
def test_onednn_is_chosen_for_large_matrices_in_single_precision():
    a = torch.randn(128, 128)
    assert pays(a, a)
    assert not pays(a[:8, :8], a[:8, :8])
    assert not pays(a.double(), a.double())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not pays(a, a)


def test_onednn_is_left_alone_without_avx_512(monkeypatch):
    monkeypatch.setattr(gemm, "WIDE", False)
    assert not pays(torch.randn(128, 128), torch.randn(128, 128))


def test_a_product_that_autograd_differentiates_is_left_to_pytorch():
    a = torch.randn(128, 128, requires_grad=True)
    multiply(a, a.detach()).sum().backward()
    torch.testing.assert_close(a.grad, a.detach().sum(1).expand(128, 128), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert pays(a, a) == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("size", [96, 5])
@pytest.mark.parametrize("batched", ["left", "right", "both"])
@pytest.mark.parametrize("onto", [False, True])
def test_blocks_of_products(size, batched, onto):
    torch.manual_seed(0)
    a, b = (torch.randn(3, size, 2 * size).mT, torch.randn(3, size, size)) if size == 5 else torch.randn(2, 3, 128, 128)
    c = torch.randn(3, a.shape[1], b.shape[2])
    in_dims = (0 if batched != "right" else None, 0 if batched != "left" else None, 0 if onto else None)
    given = [t if at == 0 else t[0] for t, at in zip((a, b, c), in_dims, strict=True)]
    expected = torch.matmul(given[0].double(), given[1].double()) + (c.double() if onto else 0)
    made = torch.vmap(lambda a, b, c: product(a, b, onto=c if onto else None), in_dims)(*given)
    _close(made, expected)


def test_a_product_made_by_onednn_has_a_derivative():
    torch.manual_seed(0)
    a, b, da = torch.randn(128, 96), torch.randn(96, 128), torch.randn(128, 96)
    _, derivative = imstep.jvp(lambda t: multiply(t, b), (a,), (da,))
    _close(derivative, da.double() @ b.double())


def test_hessian_with_and_without_onednn():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 128)), torch.randn(128, 128)
    closure = lambda: (model(x) - x).pow(2).mean()
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    hessian = imstep.Hessian(closure, model)
    fast, block = hessian @ v, hessian @ torch.stack([v, -v], 1)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = hessian @ v
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(block, torch.stack([expected, -expected], 1), rtol=1e-4, atol=1e-6)
