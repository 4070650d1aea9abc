"""Finite arithmetic is complex arithmetic: h² terms are kept, and a tiny h loses nothing.

For an analytic function g along a direction, with a = (g(x+hv) + g(x-hv))/2 and b = (g(x+hv) - g(x-hv))/2h,

    Re g(x+ihv) + a - 2 g(x) = O(h⁴)        Im g(x+ihv)/h + b - 2 g'(x)v = O(h⁴)

so real evaluations alone tell whether both parts are those of a complex evaluation up to the third order. Here g is
the gradient of a network's loss, so every backward operator is tested as well.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imstep
from imstep.complexstep import Arithmetic

Loss = Callable[[Tensor], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W = randn(4, 6, seed=1)
FILTER, FILTER_T = randn(3, 2, 3, 3, seed=2), randn(2, 3, 2, 2, seed=3)
SIXTH = float(torch.tensor(1 / 6))  # PyTorch's hardsigmoid rounds the constant to single precision
LABELS = torch.tensor([0, 2, 1, 3, 2, 0])

ACTIVATIONS = {
    f.__name__: f
    for f in (
        torch.tanh,
        torch.sigmoid,
        torch.exp,
        torch.sin,
        torch.erf,
        torch.relu,
        F.leaky_relu,
        F.elu,
        F.celu,
        F.selu,
        F.silu,
        F.mish,
        F.softplus,
        F.gelu,
        F.hardtanh,
        F.hardswish,
        F.hardsigmoid,
        F.softsign,
        F.tanhshrink,
        F.logsigmoid,
        F.relu6,
        F.softshrink,
        torch.abs,
    )
} | {"gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "prelu": lambda t: F.prelu(t, t.new_tensor([0.2]))}


def dense(activation: Callable[[Tensor], Tensor]) -> Loss:
    """Two dense layers of 24 parameters."""
    return lambda x: ((activation(randn(5, 4, seed=4) @ (W + 0.2 * x.reshape(4, 6))) @ W.t()) ** 2).mean()


def images(x: Tensor) -> Tensor:
    return x[:24].reshape(1, 2, 3, 4) + randn(2, 2, 3, 4, seed=7)


def rows(x: Tensor) -> Tensor:
    return x.reshape(6, 4)


LOSSES: dict[str, Loss] = {name: dense(f) for name, f in ACTIVATIONS.items()} | {
    "conv2d": lambda x: (F.conv2d(images(x), FILTER + x[:3, None, None, None], padding=1) ** 3).sum(),
    "conv_transpose2d": lambda x: (F.conv_transpose2d(images(x), FILTER_T * x[:2, None, None, None]) ** 3).sum(),
    "max_pool2d": lambda x: (F.max_pool2d(images(x), 2) ** 3).sum(),
    "avg_pool2d": lambda x: (F.avg_pool2d(images(x), 2) ** 3).sum(),
    "adaptive_avg_pool2d": lambda x: (F.adaptive_avg_pool2d(images(x), 2) ** 3).sum(),
    "batch_norm": lambda x: (F.batch_norm(rows(x), None, None, x[:4], x[4:8], training=True) ** 3).sum(),
    "layer_norm": lambda x: (F.layer_norm(rows(x), (4,), x[:4], x[4:8]) ** 3).sum(),
    "group_norm": lambda x: (F.group_norm(images(x), 2) ** 3).sum(),
    "softmax": lambda x: (rows(x).softmax(1) ** 2 * rows(x)).sum(),
    "cross_entropy": lambda x: F.cross_entropy(rows(x), LABELS, label_smoothing=0.1),
    "mse": lambda x: F.mse_loss(rows(x).tanh(), randn(6, 4, seed=8)),
    "huber": lambda x: F.huber_loss(rows(x).tanh(), randn(6, 4, seed=8)),
    "l1": lambda x: F.l1_loss(rows(x).tanh(), randn(6, 4, seed=8)),
    "bce": lambda x: F.binary_cross_entropy(rows(x).sigmoid(), randn(6, 4, seed=8).sigmoid()),
    "bce_with_logits": lambda x: F.binary_cross_entropy_with_logits(rows(x), randn(6, 4, seed=8).sigmoid()),
    "kl_div": lambda x: F.kl_div(rows(x).log_softmax(1), rows(x).flip(0).softmax(1)),
    "powers": lambda x: (x**3 + (x * x + 1) ** -1.5 + (x * x) ** (x / 9) + 2**x).sum(),
    "quotients": lambda x: (x / (1 + x * x) + torch.addcdiv(x, x.sin(), x.exp())).pow(2).sum(),
    "norms": lambda x: rows(x).norm(dim=1).prod() + x.var() * x.std() + x.logsumexp(0),
    "indexing": lambda x: (x[LABELS] * x.scatter_add(0, LABELS, x[:6] ** 2)[:6]).sum() + x.sort()[0][3:9].prod(),
    "dropout": lambda x: (F.dropout(rows(x).sin(), 0.3) ** 2).sum(),
    "angles": lambda x: (torch.atan2(x, x.flip(0)) * torch.hypot(x, x.flip(0)) + torch.logaddexp(x, x.sin())).sum(),
    "embedding": lambda x: (F.embedding(LABELS, x[:16].reshape(4, 4)) ** 3).sum(),
    "bilinear": lambda x: nn.functional.bilinear(rows(x), rows(x).flip(0), x.reshape(1, 4, 6)[:, :, :4]).exp().mean(),
}
WITHOUT_SQUARES = {"bilinear"}  # no formula that keeps h²


def gradient(f: Loss, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def double_backward(f: Loss, x: Tensor, v: Tensor) -> Tensor:
    f = dense(lambda t: F.relu6(t + 3) * SIXTH) if f is LOSSES["hardsigmoid"] else f  # PyTorch has no second derivative
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    g = torch.autograd.grad(f(x), x, create_graph=True)[0]
    return torch.autograd.grad(g @ v, x)[0]


def complex_gradient(f: Loss, x: Tensor, v: Tensor, h: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    arithmetic = Arithmetic(h)
    arithmetic.attach(x, v)
    with arithmetic, torch.enable_grad():
        (g,) = arithmetic.gradient(f(x), [x])
    assert g is not None
    return g.detach(), arithmetic.value(g).imaginary.detach()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - WITHOUT_SQUARES))
def test_both_parts_are_complex_to_third_order(name: str) -> None:
    f, x, v, h = LOSSES[name], randn(24, seed=5), randn(24, seed=6), 1e-3
    v = v / v.norm()
    re, im = complex_gradient(f, x, v, h)
    ahead, behind, here = (gradient(f, x + t * v) for t in (h, -h, 0.0))
    slope = double_backward(f, x, v)
    scale = 1 + max(here.abs().max(), slope.abs().max())
    # h² is 1e-6: a lost square would show a thousand times above these bounds wherever the loss has one.
    torch.testing.assert_close(re + (ahead + behind) / 2, 2 * here, rtol=0, atol=float(2e-9 * scale))
    torch.testing.assert_close((im + (ahead - behind) / (2 * h)) / 2, slope, rtol=0, atol=float(2e-9 * scale))


@pytest.mark.parametrize("h", [1e-8, 1e-20, 1e-300])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_tiny_steps_lose_nothing(name: str, h: float) -> None:
    f, x, v = LOSSES[name], randn(24, seed=5), randn(24, seed=6)
    if name in WITHOUT_SQUARES and h > 1e-10:
        pytest.skip("no formula that keeps h²")
    expected = double_backward(f, x, v)
    torch.manual_seed(3)
    found = imstep.hvp(f, x, v, h=h)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=float(1e-12 * (1 + expected.abs().max())))


@pytest.mark.parametrize("name", ["conv2d", "tanh", "gelu", "softmax", "batch_norm", "cross_entropy", "powers"])
def test_single_precision(name: str) -> None:
    f, x, v = LOSSES[name], randn(24, seed=5), randn(24, seed=6)
    expected = double_backward(f, x, v)
    for h in (1e-3 if name == "conv2d" else 1e-5, 1e-20, 1e-30):
        found = imstep.hvp(lambda t: f(t).float(), x.float(), v.float(), h=h)
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 1e-4 if h == 1e-3 else error < 1e-5


def test_a_square_that_is_not_known_is_refused() -> None:
    x = torch.eye(3, dtype=torch.float64) * 2
    with pytest.raises(imstep.UnsupportedOperatorError, match="smaller h"):
        imstep.hvp(lambda t: torch.linalg.inv(t).sum(), x, x, h=1e-3)
    assert imstep.hvp(lambda t: torch.linalg.inv(t).sum(), x, x, h=1e-20).isfinite().all()


def test_outside_its_domain_a_function_stays_undefined() -> None:
    """log(-1 + ih) is defined as a complex number; the real function that is differentiated is not."""
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    product = imstep.hvp(lambda t: (torch.log(t) + torch.sqrt(t)).sum(), x, torch.ones_like(x), h=1e-20)
    assert product.isnan().tolist() == [True, False]
