"""Compiled models, and PyTorch's own derivatives, inside the loss: against closed forms by double backward."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as functions_mapped
from torch._higher_order_ops import scan, while_loop
from torch.autograd import functional

import imstep
from imstep.complexstep.errors import ComplexStepError


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, U = _normal(3, seed=1), _normal(3, seed=2)


def _value(w: Tensor, x: Tensor) -> Tensor:
    return (torch.tanh(w.reshape(4, 3) @ x) ** 2).sum()


def _vector(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(w.reshape(4, 3) @ x)


def _jacobian(w: Tensor) -> Tensor:
    """Of ``_vector`` in x, in closed form."""
    w = w.reshape(4, 3)
    return (1 - torch.tanh(w @ X) ** 2)[:, None] * w


def _gradient(w: Tensor) -> Tensor:
    return 2 * _vector(w, X) @ _jacobian(w)


def _hessian(w: Tensor) -> Tensor:
    """Of ``_value`` in x, in closed form."""
    t = torch.tanh(w.reshape(4, 3) @ X)
    weights = 2 * (1 - t**2) ** 2 - 4 * t**2 * (1 - t**2)
    return w.reshape(4, 3).t() @ (weights[:, None] * w.reshape(4, 3))


def _linearized(w: Tensor) -> Tensor:
    value, push = torch.func.linearize(lambda x: _vector(w, x), X)
    return value * push(U)


PAIRS = {
    "functional.jacobian": (
        lambda w: functional.jacobian(lambda x: _vector(w, x), X, create_graph=True),
        _jacobian,
    ),
    "functional.hessian": (lambda w: functional.hessian(lambda x: _value(w, x), X, create_graph=True), _hessian),
    "functional.vjp": (
        lambda w: functional.vjp(lambda x: _vector(w, x), X, torch.ones(4).double(), create_graph=True)[1],
        lambda w: _jacobian(w).sum(0),
    ),
    "functional.jvp": (
        lambda w: functional.jvp(lambda x: _vector(w, x), X, U, create_graph=True)[1],
        lambda w: _jacobian(w) @ U,
    ),
    "functional.hvp": (
        lambda w: functional.hvp(lambda x: _value(w, x), X, U, create_graph=True)[1],
        lambda w: _hessian(w) @ U,
    ),
    "functional.vhp": (
        lambda w: functional.vhp(lambda x: _value(w, x), X, U, create_graph=True)[1],
        lambda w: _hessian(w) @ U,
    ),
    "func.jacfwd": (lambda w: torch.func.jacfwd(lambda x: _vector(w, x))(X), _jacobian),
    "func.jacrev": (lambda w: torch.func.jacrev(lambda x: _vector(w, x))(X), _jacobian),
    "func.hessian": (lambda w: torch.func.hessian(lambda x: _value(w, x))(X), _hessian),
    # What linearize returns is folded into constants, for PyTorch's gradient as well.
    "func.linearize": (_linearized, lambda w: _vector(w, X) * (_jacobian(w.detach()) @ U)),
    "func.vjp": (
        lambda w: torch.func.vjp(lambda x: _vector(w, x), X)[1](torch.ones(4).double())[0],
        lambda w: _jacobian(w).sum(0),
    ),
    "jacfwd in the parameters": (
        lambda w: torch.func.jacfwd(lambda p: _value(p, X))(w),
        lambda w: ((2 * _vector(w, X) * (1 - _vector(w, X) ** 2))[:, None] * X).flatten(),
    ),
}


def _double_backward(f, w: Tensor, v: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    g = torch.autograd.grad(f(w), w, create_graph=True)[0]
    return torch.autograd.grad(g @ v, w)[0]


@pytest.mark.parametrize("name", PAIRS)
def test_derivatives_inside_the_loss(name):
    inner, closed = PAIRS[name]
    w, v = 0.5 * _normal(12, seed=3), _normal(12, seed=4)
    loss = lambda f: lambda t: f(t).sin().pow(2).sum()
    expected = _double_backward(loss(closed), w, v)
    torch.testing.assert_close(imstep.hvp(loss(inner), w, v), expected, rtol=1e-11, atol=1e-12)
    p = w.clone().requires_grad_()
    hessian = imstep.Hessian(lambda: loss(inner)(p), [p])
    torch.testing.assert_close(hessian @ v, expected, rtol=1e-11, atol=1e-12)


_OF_POINTS = {
    "jacobian": lambda f, x: functional.jacobian(f, x, create_graph=True),
    "hessian": lambda f, x: functional.hessian(lambda t: f(t).sum(), x, create_graph=True),
    "vjp": lambda f, x: functional.vjp(f, x, x.cos(), create_graph=True)[1],
    "jvp": lambda f, x: functional.jvp(f, x, x.cos(), create_graph=True)[1],
    "hvp": lambda f, x: functional.hvp(lambda t: f(t).sum(), x, x.cos(), create_graph=True)[1],
    "vhp": lambda f, x: functional.vhp(lambda t: f(t).sum(), x, x.cos(), create_graph=True)[1],
}


@pytest.mark.parametrize("name", _OF_POINTS)
def test_points_that_functional_takes_up_move(name):
    """Those of a jvp require no gradients, so that it detaches them, for a graph of its own."""
    f = lambda x: _OF_POINTS[name](lambda t: t.sin() * t.roll(1), x).square().sum()
    x, u = _normal(4), _normal(4, seed=1)
    point = x.clone().requires_grad_()
    value, tangent = imstep.jvp(f, (x,), (u,))
    torch.testing.assert_close(value, f(x))
    torch.testing.assert_close(tangent, torch.autograd.grad(f(point), point)[0] @ u)
    apart = imstep.jvp(lambda x: f(x.detach()), (x,), (u,))[1]
    assert float(apart) == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_run_uncompiled(backend):
    """The same products before and after the model has been compiled, which it stays for the user."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = _normal(7, 3)
    plain = imstep.Hessian(lambda: model(x).square().mean(), model)
    v = _normal(plain.size, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend=backend)
        fresh = imstep.Hessian(lambda: compiled(x).square().mean(), model) @ v
        value = compiled(x)
        warm = imstep.Hessian(lambda: compiled(x).square().mean(), model) @ v
    torch.testing.assert_close(value, model(x))
    torch.testing.assert_close(fresh, plain @ v, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(warm, plain @ v, rtol=1e-12, atol=1e-13)


_A = _normal(5, 3, seed=3)
_MODEL = nn.Linear(3, 2).double()


def _loss() -> Tensor:
    return (_MODEL(_A) ** 4).sum()


def _of_outputs() -> tuple[Tensor, Tensor]:
    return _MODEL(_A), _normal(5, 2, seed=4)


def _matrix() -> imstep.Hessian:
    return imstep.Hessian(_loss, _MODEL)


_CALLS = {
    "derivative": lambda w: imstep.derivative(torch.sin, w),
    "jvp": lambda w: imstep.jvp(torch.tanh, (w,), (U,))[1],
    "hvp": lambda w: imstep.hvp(lambda w: (_A @ w).tanh().square().sum(), w, U),
    "third derivative": lambda w: imstep.third_derivative(lambda w: (_A @ w).tanh().sum(), w, U),
    "product": lambda w: _matrix() @ torch.cat([w, w, U[:2]]),
    "matrix": lambda w: _matrix().to_dense() * w[0],
    "over batches": lambda w: imstep.Hessian.over([_A, 2 * _A], lambda a: (_MODEL(a) ** 4).mean(), _MODEL).to_dense(),
    "inverse": lambda w: _matrix().inverse(damping=1.0) @ torch.cat([w, w, U[:2]]),
    "Jacobian": lambda w: imstep.Jacobian(lambda: _MODEL(_A), _MODEL).to_dense() * w[0],
    "Gauss-Newton": lambda w: (
        imstep.GaussNewton(_of_outputs, _MODEL, loss=nn.functional.mse_loss) @ torch.cat([w, w, U[:2]])
    ),
    "K-FAC": lambda w: (
        imstep.curvature.KFAC(lambda: nn.functional.mse_loss(*_of_outputs()), _MODEL) @ torch.cat([w, w, U[:2]])
    ),
    "trace": lambda w: imstep.spectral.trace(_matrix()).value * w,
    "eigenpairs": lambda w: imstep.spectral.eigenpairs(_matrix(), 2).values * w[0],
    "covariance": lambda w: imstep.insight.parameter_covariance(lambda w: (_A @ w).sin(), w).standard_errors,
    "minimize": lambda w: imstep.minimize(lambda w: (_A @ w - _A[:, 0]).square().sum(), w, method="least-squares").x,
}


@pytest.mark.parametrize("name", _CALLS)
@pytest.mark.filterwarnings("ignore")
def test_calls_in_compiled_code_run_uncompiled(name):
    torch._dynamo.reset()
    call = lambda w: _CALLS[name](w + 1) * 2
    torch.testing.assert_close(torch.compile(call, backend="eager")(X), call(X), rtol=1e-9, atol=1e-11)


def _in_inference_mode(w: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = w * 2.0
    return (w.sin() * scale.clone()).sum()


def _hard_choice(w: Tensor) -> Tensor:
    torch.manual_seed(0)
    return (torch.nn.functional.gumbel_softmax(w * w, hard=True) * w).sum()


@pytest.mark.parametrize("f", [_in_inference_mode, _hard_choice])
def test_cuts_that_no_function_is_seen_to_make(f):
    """In inference mode, and within PyTorch's own functions."""
    w, v = _normal(12, seed=3), _normal(12, seed=4)
    expected = _double_backward(f, w, v)
    torch.testing.assert_close(imstep.hvp(f, w, v), expected, rtol=1e-12, atol=1e-13)
    p = w.clone().requires_grad_()
    torch.testing.assert_close(imstep.Hessian(lambda: f(p), [p]) @ v, expected, rtol=1e-12, atol=1e-13)


def _cond(w: Tensor) -> Tensor:
    return torch.cond(w.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (w,)).square().sum()


def _while(w: Tensor) -> Tensor:
    return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x.sin()), (torch.tensor(0), w))[1].square().sum()


def _scan(w: Tensor) -> Tensor:
    return scan(lambda total, x: (total * x.sin(), total + x), w.sum(), w)[1].square().sum()


def _map(w: Tensor) -> Tensor:
    return functions_mapped(lambda x: x.sin(), w).square().sum()


@pytest.mark.parametrize("f", [_cond, _while, _scan, _map])
def test_operators_that_take_functions_are_refused(f):
    p = X.clone().requires_grad_()
    for call in (
        lambda: imstep.jvp(f, (X,), (U,)),
        lambda: imstep.hvp(f, X, U),
        lambda: imstep.Hessian(lambda: f(p), [p]),
        lambda: imstep.NewtonKrylov([p]).step(lambda: f(p)),
        lambda: imstep.LeastSquares([p]).step(lambda: f(p)),
    ):
        with pytest.raises(imstep.UnsupportedOperatorError, match=r"takes functions.*Write it in Python"):
            call()


_COLD = """
import torch, imstep
w = torch.ones(3)
imstep.jvp(lambda w: torch.compile(torch.sin, backend="eager")(w).sum(), (w,), (w,))
"""


def test_a_compiler_that_is_loaded_within_is_refused():
    done = subprocess.run([sys.executable, "-c", _COLD], capture_output=True, text=True)
    assert "UnsupportedOperatorError: torch.compile" in done.stderr
    done = subprocess.run([sys.executable, "-c", "import torch._dynamo" + _COLD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("f", [lambda w: torch.select_copy(w, 0, 1), lambda w: torch.slice_copy(w, 0, 1, 3)])
def test_copies_of_views(f):
    expected = torch.autograd.functional.hvp(lambda w: f(w * w).exp().sum(), X, U)[1]
    torch.testing.assert_close(imstep.hvp(lambda w: f(w * w).exp().sum(), X, U), expected, rtol=1e-12, atol=1e-13)


@torch.jit.script
def _scripted(w: Tensor) -> Tensor:
    return (w.sin() * torch.tanh(w) * w.exp()).pow(2.0).sum()


def test_torchscript():
    """From the second call on it differentiates by itself, and detaches what it is given."""
    w, v = _normal(12, seed=3), _normal(12, seed=4)
    expected = _double_backward(lambda t: (t.sin() * torch.tanh(t) * t.exp()).pow(2.0).sum(), w, v)
    p = w.clone().requires_grad_()
    for _ in range(4):
        torch.testing.assert_close(imstep.hvp(_scripted, w, v), expected, rtol=1e-12, atol=1e-13)
        product = imstep.Hessian(lambda: _scripted(p), [p]) @ v
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-13)


@torch.jit.script
def _sparse(w: Tensor) -> Tensor:
    return torch.sparse.sum((w * w).to_sparse())


def test_refusals_in_torchscript_are_told():
    """Its interpreter shows no message of an error that was raised in Python."""
    with pytest.raises(imstep.UnsupportedOperatorError, match=r"to_sparse.*Use dense tensors"):
        imstep.hvp(_sparse, X, U)
    p = X.clone().requires_grad_()
    with pytest.raises(imstep.UnsupportedOperatorError, match="to_sparse"):
        imstep.Hessian(lambda: _sparse(p), [p])


@torch.jit.script
def _detached(w: Tensor, times: int) -> Tensor:
    total = w.exp()
    for _ in range(times):
        total = total * w.detach() + torch.sin(w)
    return total.sum()


@torch.jit.script
def _without_gradients(w: Tensor) -> Tensor:
    with torch.no_grad():
        weight = w.tanh()
    return (weight * w * w).sum()


@torch.jit.script
def _straight_through(w: Tensor) -> Tensor:
    y = 3.0 * w.exp()
    return (y + (y.round() - y).detach()).square().sum()


def _traced(w: Tensor) -> Tensor:
    return (w.exp() * w.detach() * w.sin().tanh()).sum()


@pytest.mark.parametrize(
    "f",
    [lambda w: _detached(w, 3), _without_gradients, _straight_through, torch.jit.trace(_traced, torch.ones(12))],
    ids=["loop", "no_grad", "straight through", "traced"],
)
def test_cuts_in_torchscript(f):
    """What a scripted function detaches is a constant there, too."""
    w, v = _normal(12, seed=3), _normal(12, seed=4)
    expected = _double_backward(f, w, v)
    p = w.clone().requires_grad_()
    for _ in range(3):
        torch.testing.assert_close(imstep.hvp(f, w, v), expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(imstep.Hessian(lambda: f(p), [p]) @ v, expected, rtol=1e-12, atol=1e-13)
    forward = imstep.jvp(f, (w,), (v,))[1]
    (gradient,) = torch.autograd.grad(f(p), p)
    torch.testing.assert_close(forward, gradient @ v, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("inside", [False, True])
def test_derivatives_in_inference_mode(inside):
    """They are taken there as elsewhere, of tensors that were made there, too."""
    w, v = _normal(12, seed=3), _normal(12, seed=4)
    f = lambda t: (t.sin() * t.exp()).square().sum()
    expected = _double_backward(f, w, v)
    third = imstep.third_derivative(f, w, v)
    assert third.abs().min() > 0
    with torch.inference_mode():
        w = w.clone() if inside else w
        torch.testing.assert_close(imstep.hvp(f, w, v), expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(imstep.third_derivative(f, w, v), third, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("take", ["hvp", "jvp", "derivative"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jacfwd"])
def test_derivatives_within_a_transform_are_refused(take, transform):
    """PyTorch's own errors tell of storages."""
    v, f = torch.ones(3), lambda t: (t**3).sum()
    taken = {
        "hvp": lambda t: imstep.hvp(f, t, v),
        "jvp": lambda t: imstep.jvp(torch.sin, (t,), (v,))[1],
        "derivative": lambda t: imstep.derivative(torch.sin, t),
    }[take]
    around = getattr(torch.func, transform)(lambda t: taken(t).sum())
    with pytest.raises(ComplexStepError, match=rf"imstep\.{take} is called within a transform of torch\.func"):
        around(torch.ones(2, 3) if transform == "vmap" else torch.ones(3))


@pytest.mark.parametrize("name", ["jvp", "hvp", "derivative"])
def test_dual_numbers_are_refused(name):
    x, v = torch.randn(2, 3, dtype=torch.float64)
    takes = {
        "jvp": lambda x: imstep.jvp(torch.sin, (x,), (v,)),
        "hvp": lambda x: imstep.hvp(lambda t: t.sin().sum(), x, v),
        "derivative": lambda x: imstep.derivative(torch.sin, x[0]),
    }
    with torch.autograd.forward_ad.dual_level():
        takes[name](x)
        with pytest.raises(ComplexStepError, match=f"imstep.{name} is called on dual numbers"):
            takes[name](torch.autograd.forward_ad.make_dual(x, v))


def test_leaves_that_are_no_tensors_are_refused():
    v = torch.ones(3)
    f = lambda d: (d["w"] * d["n"]).sum()
    with pytest.raises(TypeError, match="a leaf of x is of type int; leaves are tensors"):
        imstep.hvp(f, {"w": v, "n": 2}, {"w": v, "n": 0})
    with pytest.raises(TypeError, match="a leaf of v is of type ndarray; leaves are tensors"):
        imstep.hvp(lambda t: t.square().sum(), v, v.numpy())
