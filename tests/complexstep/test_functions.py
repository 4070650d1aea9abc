"""``autograd.Function`` as networks write it: detaching, switching gradients, recomputing, calling ``backward()``."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.amp import custom_fwd
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import imstep


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _twice(f, w: Tensor, v: Tensor) -> Tensor:
    w = w.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(f(w), w, create_graph=True)
    return torch.autograd.grad(g @ v, w)[0]


X, V = 0.5 * _normal(4, seed=1), _normal(4, seed=2)


# --- one tensor in, one out -------------------------------------------------------------------------------------------


def _sinh(keep):
    """sinh, whose output is kept as ``keep(x, y)``."""

    class Sinh(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.sinh()
            ctx.save_for_backward(keep(x, y))
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return g * (1 + y * y).sqrt()

    return Sinh.apply


def _under_no_grad(x, y):
    with torch.no_grad():
        return x.sinh()


def _switched(x, y):
    torch.set_grad_enabled(True)
    y = x.sinh().detach()
    torch.set_grad_enabled(False)
    return y


def _by_grad(x, y):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(x.cosh().sum(), x)[0]


@torch.no_grad()
def _decorated(x, y):
    return x.sinh().data


def _written(x, y):
    k = torch.zeros(len(x), 2, dtype=x.dtype)
    k.data[:, 0] = x.sinh()
    k[:, 0].data.add_(1.0)
    k.detach()[:, 1] = 1.0
    return k[:, 0] - k[:, 1]


def _resized(x, y):
    k = torch.empty(0, dtype=x.dtype)
    k.resize_(2).copy_(y[:2])
    k.resize_(len(x))
    k[2:] = y[2:]
    return torch.empty(0, dtype=x.dtype).resize_as_(k).copy_(k)


KEPT = {
    "detach": lambda x, y: y.detach(),
    "torch.detach": lambda x, y: torch.detach(y),
    "data": lambda x, y: y.data,
    "twice": lambda x, y: y.detach().clone().detach(),
    "detach_": lambda x, y: y.clone().detach_(),
    "no_grad": _under_no_grad,
    "switched": _switched,
    "grad": _by_grad,
    "decorated": _decorated,
    "written": _written,
    "resized": _resized,
}


@pytest.mark.parametrize("kept", KEPT)
def test_what_a_forward_keeps_moves_with_its_input(kept):
    sinh = _sinh(KEPT[kept])
    expected = _twice(lambda t: t.sinh().pow(3).sum(), X, V)
    loss = lambda t: sinh(t).pow(3).sum()
    torch.testing.assert_close(imstep.hvp(loss, X, V), expected, rtol=1e-12, atol=1e-13)
    w = X.clone().requires_grad_()
    for budget in (None, 0):
        hessian = imstep.Hessian(lambda: loss(w), [w], memory_budget=budget)
        torch.testing.assert_close(hessian @ V, expected, rtol=1e-12, atol=1e-13)


def test_an_island_around_a_function_is_one():
    sinh = _sinh(KEPT["switched"])

    def loss(t):
        with torch.no_grad():
            scale = sinh(t)
        return (t.sin() * scale).sum()

    torch.testing.assert_close(imstep.hvp(loss, X, V), -X.sin() * X.sinh() * V)


class _Context(Function):
    """Kept on ctx, past autograd; with the newer signature and a rule for vmap and forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        y = x.sinh()
        return y, y.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1].detach())
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx, g, _):
        return g * (1 + ctx.saved_tensors[0] ** 2).sqrt()

    @staticmethod
    def jvp(ctx, dx):
        return dx * (1 + ctx.saved_tensors[0].detach() ** 2).sqrt(), None


class _Swish(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x * x.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        s = ctx.x.sigmoid().detach()
        return g * s * (1 + ctx.x.data * (1 - s))


class _Double(Function):
    """In place."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        ctx.before = x.detach().clone()
        x.detach().mul_(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.before


class _Pair(Function):
    """Of two outputs one may be unused."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        s, c = x.sin(), x.cos()
        ctx.kept = s.detach(), c.detach()
        return s, c

    @staticmethod
    def backward(ctx, gs, gc):
        s, c = ctx.kept
        total = torch.zeros_like(s)
        for g, slope in ((gs, c), (gc, -s)):
            if g is not None:
                total = total + g.detach() * slope
        return total


class _Outer(Function):
    """A Function within a Function, run again in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.detach())
        return _Swish.apply(x.detach()).sin()

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = _Swish.apply(x).sin()
        return torch.autograd.grad(y, x, g.detach())[0]


def _swish(x):
    return x * x.sigmoid()


PAIRS = {
    "setup_context": (lambda t: _Context.apply(t)[0], torch.sinh),
    "vmap": (lambda t: torch.func.vmap(lambda x: _Context.apply(x)[0])(t), torch.sinh),
    "swish": (_Swish.apply, _swish),
    "in place": (lambda t: _Double.apply(t.sin()), lambda t: t.sin() ** 2),
    "first": (lambda t: _Pair.apply(t)[0], torch.sin),
    "second": (lambda t: _Pair.apply(t)[1], torch.cos),
    "both": (lambda t: sum(_Pair.apply(t)), lambda t: t.sin() + t.cos()),
    "nested": (_Outer.apply, lambda t: _swish(t).sin()),
}


@pytest.mark.parametrize("name", PAIRS)
def test_functions_are_what_they_compute(name):
    written, plain = PAIRS[name]
    loss = lambda f: lambda t: (f(t) * t).sin().pow(2).sum()
    expected = _twice(loss(plain), X, V)
    torch.testing.assert_close(imstep.hvp(loss(written), X, V), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        imstep.jvp(loss(written), (X,), (V,))[1], torch.func.jvp(loss(plain), (X,), (V,))[1], rtol=1e-12, atol=1e-13
    )
    w = X.clone().requires_grad_()
    torch.testing.assert_close(imstep.Hessian(lambda: loss(written)(w), [w]) @ V, expected, rtol=1e-12, atol=1e-13)


def _wrapped(f):
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        with torch.no_grad():
            return f(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("contextless", [True, False])
@pytest.mark.parametrize("decorator", [torch.no_grad(), torch.enable_grad(), custom_fwd(device_type="cpu"), _wrapped])
def test_decorated_functions(decorator, contextless):
    """Whatever is around a forward is within the Function, too."""

    class Contextless(Function):
        @staticmethod
        @decorator
        def forward(x):
            return x.detach().sinh()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0].detach())

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cosh()

    class WithContext(Contextless):
        setup_context = Function.setup_context

        @staticmethod
        @decorator
        def forward(ctx, x):
            ctx.save_for_backward(x.detach())
            return x.detach().sinh()

    sinh = (Contextless if contextless else WithContext).apply
    loss = lambda f: lambda t: (f(t) * t).sin().sum()
    torch.testing.assert_close(imstep.hvp(loss(sinh), X, V), _twice(loss(torch.sinh), X, V), rtol=1e-12, atol=1e-13)


def test_derivatives_of_a_function_inside_the_loss():
    """What it keeps is a constant to the gradient that PyTorch takes, and moves with the point where it is taken."""
    sinh = lambda x: _Context.apply(x)[0]
    by_grad = lambda t: (torch.func.grad(lambda x: sinh(x).pow(2).sum())(t)).pow(2).sum()
    gradient = lambda t: 2 * (2 * t.sinh() * t.cosh()) * 2 * t.cosh() ** 2  # d/dt (2 sinh t · c)², c = cosh t kept
    torch.testing.assert_close(imstep.hvp(by_grad, X, V), torch.func.jvp(gradient, (X,), (V,))[1])
    by_jvp = lambda t: torch.func.jvp(sinh, (t,), (t.sin(),))[1].pow(2).sum()
    gradient = lambda t: 2 * t.sin() * t.cosh() ** 2 * t.cos()
    torch.testing.assert_close(imstep.hvp(by_jvp, X, V), torch.func.jvp(gradient, (X,), (V,))[1])


def test_numpy_within_a_function_is_refused():
    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.from_numpy(x.detach().numpy().copy()).sin()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    with pytest.raises(imstep.UnsupportedOperatorError, match=r"outside PyTorch.*within it .detach\(\) changes"):
        imstep.hvp(lambda t: Sine.apply(t).sum(), X, V)


def test_hooks_are_no_islands():
    def loss(t):
        h = t.sin()
        h.register_hook(lambda g: g.detach() * h.detach())
        return h.pow(2).sum()

    gradient = lambda t: 2 * t.sin() ** 2 * t.cos()
    expected = torch.func.jvp(gradient, (X,), (V,))[1]
    torch.testing.assert_close(imstep.hvp(loss, X, V), expected, rtol=1e-12, atol=1e-13)


def test_hvp_within_a_function():
    """What is around the arithmetic does not count."""
    seen = []

    class Look(Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(imstep.hvp(lambda t: (t.sin() * t.detach()).sum(), X, V))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(imstep.hvp(lambda t: (t.sin() * t.detach()).sum(), X, V))
            return g

    Look.apply(X.clone().requires_grad_()).sum().backward()
    assert len(seen) == 2
    for product in seen:
        torch.testing.assert_close(product, -X.sin() * X * V)
