"""Functions that run ``backward()`` in their own backward pass: reversible networks and re-entrant checkpoints."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import imstep
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector

D = torch.float64


class _Blocks(nn.Module):
    """y1 = x1 + f(x2), y2 = x2 + g(y1), twice, behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        self.first, self.f, self.g = nn.Linear(4, 4), block(), block()

    def plain(self, x: Tensor) -> Tensor:
        x1, x2 = self.first(x).chunk(2, -1)
        for _ in range(2):
            x1 = x1 + self.f(x2)
            x2 = x2 + self.g(x1)
        return torch.cat([x1, x2], -1)

    def reversible(self, backward, x: Tensor, listed: bool) -> Tensor:
        x, parameters = self.first(x), (*self.f.parameters(), *self.g.parameters()) if listed else ()
        for _ in range(2):
            x = _Reversible.apply(x, self.f, self.g, backward, *parameters)
        return x


class _Reversible(Function):
    @staticmethod
    def forward(ctx, x, f, g, backward, *parameters):
        x1, x2 = x.chunk(2, -1)
        with torch.no_grad():
            y1 = x1 + f(x2)
            y2 = x2 + g(y1)
        ctx.f, ctx.g, ctx.run, ctx.parameters = f, g, backward, parameters
        ctx.save_for_backward(y1.detach(), y2.detach())
        return torch.cat([y1, y2], -1)

    @staticmethod
    def backward(ctx, dy):
        y1, y2 = ctx.saved_tensors
        dy1, dy2 = dy.chunk(2, -1)
        gy, d1, of_g = ctx.run(ctx.g, y1, dy2)
        with torch.no_grad():
            x2, dx1 = y2 - gy, dy1 + d1
        _, d2, of_f = ctx.run(ctx.f, x2, dx1)
        given = [*of_f, *of_g] if of_f else [None] * len(ctx.parameters)
        return torch.cat([dx1, dy2 + d2], -1), None, None, None, *given


def _by_backward(block, y, dy):
    """As in Reformer: gradients of the block's parameters go to ``.grad``."""
    with torch.enable_grad():
        y.requires_grad = True
        z = block(y)
        z.backward(dy, retain_graph=True)
        with torch.no_grad():
            z = z.detach()
    return z, y.grad, []


def _by_autograd_backward(block, y, dy):
    with torch.set_grad_enabled(True):
        y = y.detach().requires_grad_()
        z = block(y)
    torch.autograd.backward([z], [dy], inputs=[y, *block.parameters()])
    return z.data, y.grad, []


def _by_grad(block, y, dy):
    with torch.enable_grad():
        y = y.detach_().requires_grad_()
        z = block(y)
    dx, *given = torch.autograd.grad(z, [y, *block.parameters()], dy)
    return z.detach(), dx, given


def _harvesting(block, y, dy):
    """``.grad`` of the parameters is put aside, and what it becomes is returned."""
    before = [p.grad for p in block.parameters()]
    for p in block.parameters():
        p.grad = None
    z, dx, _ = _by_backward(block, y.detach(), dy)
    given = [p.grad for p in block.parameters()]
    for p, g in zip(block.parameters(), before, strict=True):
        p.grad = g
    return z, dx, given


WAYS = [(_by_backward, False), (_by_backward, True), (_by_autograd_backward, False), (_by_autograd_backward, True)]
WAYS += [(_by_grad, True), (_harvesting, True)]


def _setting():
    torch.manual_seed(0)
    return _Blocks().double(), torch.randn(5, 4, dtype=D), torch.randn(5, 4, dtype=D)


def _derivatives(loss, module, v: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient and the Hessian product, by double backward."""
    parameters = list(module.parameters())
    flat = lambda parts: torch.cat([p.flatten() for p in parts])
    g = flat(torch.autograd.grad(loss(), parameters, create_graph=True))
    return g.detach(), flat(torch.autograd.grad(g @ v, parameters))


def _closure(loss, module, calls: bool):
    def closure():
        module.zero_grad()
        value = loss()
        if calls:
            value.backward()
        return value

    return closure


def _agree(loss, plain, module) -> None:
    v = torch.randn(sum(p.numel() for p in module.parameters()), dtype=D)
    gradient, product = _derivatives(plain, module, v)
    for calls in (False, True):
        for budget in (None, 0):
            hessian = imstep.Hessian(_closure(loss, module, calls), module, memory_budget=budget)
            torch.testing.assert_close(hessian.gradient, gradient, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(hessian @ v, product, rtol=1e-11, atol=1e-12)
    without_products = FrozenClosure(loss, ParameterVector(module)).gradient()[1]
    torch.testing.assert_close(without_products, gradient, rtol=1e-11, atol=1e-13)
    pair = torch.stack([v, 2 * v], 1)
    torch.testing.assert_close(imstep.Hessian(loss, module) @ pair, torch.stack([product, 2 * product], 1))


@pytest.mark.parametrize(("backward", "listed"), WAYS)
def test_reversible_networks(backward, listed):
    module, x, target = _setting()
    mean = lambda y: (y - target).pow(2).mean()
    _agree(lambda: mean(module.reversible(backward, x, listed)), lambda: mean(module.plain(x)), module)
    v = torch.randn(sum(p.numel() for p in module.parameters()), dtype=D)
    found = imstep.GaussNewton(lambda: (module.reversible(backward, x, listed), target), module) @ v
    torch.testing.assert_close(found, imstep.GaussNewton(lambda: (module.plain(x), target), module) @ v)


@pytest.mark.parametrize("backward", [_by_backward, _by_autograd_backward])
def test_rows_of_a_jacobian_are_refused(backward):
    module, x, target = _setting()
    loss = lambda: (module.reversible(backward, x, True) - target).pow(2).mean()
    with pytest.raises(ValueError, match=r"backward\(\) within its own.*torch.autograd.grad"):
        imstep.LeastSquares(module.parameters()).step(loss)
    assert all(p.grad is None for p in module.parameters())
    imstep.LeastSquares(module.parameters()).step(lambda: (module.reversible(_by_grad, x, True) - target).pow(2).mean())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    """``torch.autograd.grad`` knows no re-entrant ones; the closure's ``backward()`` and our gradient do."""
    module, x, target = _setting()
    again = lambda f, t: checkpoint(f, t, use_reentrant=reentrant)
    mean = lambda y: (y - target).pow(2).mean()

    def loss():
        y = module.first(x)
        return mean(again(lambda t: torch.cat([again(module.f, t[:, :2]).sin(), module.g(t[:, 2:])], 1), y))

    def plain():
        y = module.first(x)
        return mean(torch.cat([module.f(y[:, :2]).sin(), module.g(y[:, 2:])], 1))

    _agree(loss, plain, module)


@pytest.mark.parametrize("reentrant", [False, True])
def test_third_derivatives_through_a_checkpoint(reentrant):
    block = lambda t: (t * t.sigmoid()).pow(3) * t.detach()
    loss = lambda t: checkpoint(block, t.sin(), use_reentrant=reentrant).sum()
    x, v = torch.randn(4, dtype=D), torch.randn(4, dtype=D)
    expected = imstep.third_derivative(lambda t: block(t.sin()).sum(), x, v)
    torch.testing.assert_close(imstep.third_derivative(loss, x, v), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_attention(reentrant, training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double().train(training)
    x = torch.randn(2, 3, 4, dtype=D, requires_grad=True)

    def plain():
        with sdpa_kernel(SDPBackend.MATH):
            return layer(x).pow(2).mean()

    loss = lambda: checkpoint(layer, x, use_reentrant=reentrant).pow(2).mean()
    _agree(loss, plain, layer)
    for optimizer in (imstep.NewtonKrylov, imstep.LeastSquares):
        if not (reentrant and optimizer is imstep.LeastSquares):
            before = float(loss().detach())
            optimizer(layer.parameters()).step(loss)
            assert float(loss().detach()) < before


def test_a_backend_chosen_by_the_user_gives_way():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=D)

    def loss(chosen):
        with sdpa_kernel(chosen):
            y = layer(x)
            return nn.functional.scaled_dot_product_attention(y, y, y).pow(2).mean()

    chosen = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    _agree(lambda: loss(chosen), lambda: loss(SDPBackend.MATH), layer)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_kernels_are_avoided_in_backward_passes(kind):
    """What a Function evaluates in its backward pass is steered like anything else."""
    module, x = kind(3, 4).double(), torch.randn(5, 2, 3, dtype=D)

    class Again(Function):
        @staticmethod
        def forward(ctx, x, *parameters):
            ctx.save_for_backward(x, *parameters)
            return module(x)[0].cumprod(0)

        @staticmethod
        def backward(ctx, g):
            x, *parameters = ctx.saved_tensors
            with torch.enable_grad():
                y = module(x)[0].cumprod(0)
            return None, *torch.autograd.grad(y, parameters, g)

    with torch.backends.mkldnn.flags(enabled=False):
        v = torch.randn(sum(p.numel() for p in module.parameters()), dtype=D)
        _, product = _derivatives(lambda: module(x)[0].cumprod(0).sum(), module, v)
    hessian = imstep.Hessian(lambda: Again.apply(x, *module.parameters()).sum(), module)
    torch.testing.assert_close(hessian @ v, product, rtol=1e-11, atol=1e-12)


# --- hooks on saved tensors -------------------------------------------------------------------------------------------


def _save(t: Tensor) -> Tensor:
    return t.detach().clone()


@pytest.mark.parametrize("hooks", [lambda: saved_tensors_hooks(_save, torch.Tensor.detach), save_on_cpu])
def test_saved_tensors_elsewhere(hooks):
    module, x, target = _setting()

    def loss():
        with hooks():
            return (module.plain(x) - target).pow(2).mean()

    _agree(loss, lambda: (module.plain(x) - target).pow(2).mean(), module)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("method", [imstep.NewtonKrylov, imstep.LeastSquares, imstep.methods.natural_gradient])
@pytest.mark.parametrize("hooks", [lambda: saved_tensors_hooks(_save, torch.Tensor.detach), save_on_cpu])
def test_steps_with_saved_tensors_elsewhere(hooks, method, around):
    """Graphs are gone through again after the evaluation, as for Kronecker factors."""
    results = []
    for kind in (nullcontext, hooks):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        x, target = torch.randn(9, 3, dtype=D), torch.randn(9, 2, dtype=D)
        optimizer = method(module.parameters())

        def loss(kind=kind, module=module, x=x, target=target):
            with nullcontext() if around else kind():
                return (module(x) - target).square().mean()

        for _ in range(3):
            with kind() if around else nullcontext():
                optimizer.step(loss)
        results.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("unpack", [torch.from_numpy, torch.tensor])
def test_saved_tensors_outside_pytorch_are_refused(unpack):
    pack = (lambda t: t.detach().numpy().copy()) if unpack is torch.from_numpy else lambda t: t.detach().tolist()

    def loss(t):
        with saved_tensors_hooks(pack, lambda a: unpack(a).double()):
            return t.sin().exp().sum()

    with pytest.raises(imstep.UnsupportedOperatorError, match=r"without its imaginary part.*save_on_cpu"):
        imstep.hvp(loss, torch.ones(3, dtype=D), torch.ones(3, dtype=D))
