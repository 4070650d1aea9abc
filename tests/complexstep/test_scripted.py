"""TorchScript that has an optimised plan of its own: against functions that are not scripted, by double backward."""

import io
import threading

import pytest
import torch
from torch import Tensor, nn

import imstep

_draw = torch.Generator().manual_seed(0)
X, W, V = (torch.randn(n, 4, generator=_draw, dtype=torch.float64) for n in (5, 4, 4))
TIMES = torch.randn(4, generator=_draw, dtype=torch.float64)


def _plain(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.8 * x * (1 + 0.05 * x * x)))


@torch.jit.script
def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.8 * x * (1 + 0.05 * x * x)))


@torch.jit.script
def _inner(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.8 * x * (1 + 0.05 * x * x)))


@torch.jit.script
def _repeated(x: Tensor, times: int = 2, factor: float = 1.0) -> Tensor:
    for _ in range(times):
        x = _inner(x) * factor
    return x


@torch.jit.script
def _forked(x: Tensor) -> Tensor:
    return torch.jit.wait(torch.jit.fork(_inner, x)) * x


@torch.jit.script
class _Activation:
    def __init__(self, times: Tensor):
        self.times = times

    def act(self, x: Tensor) -> Tensor:
        return _inner(x) * self.times


@torch.jit.interface
class _Acts:
    def act(self, x: Tensor) -> Tensor:
        pass


@torch.jit.script
def _by_interface(activation: _Acts, x: Tensor) -> Tensor:
    return activation.act(x)


@torch.jit.interface
class _Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        pass


class _Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.times = nn.Parameter(TIMES.clone())

    def forward(self, x: Tensor) -> Tensor:
        return _inner(x) * self.times


class _Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _inner(x)


class _Open(nn.Module):
    """A module that knows the interface of another, whose method is found when it runs."""

    inner: _Layer

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Gelu()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _loaded() -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(_Gelu()), file)
    file.seek(0)
    return torch.jit.load(file)


_timed = lambda x: _plain(x) * TIMES
CASES = {
    "function": (_gelu, _plain),  # which nothing else calls
    "arguments by name": (lambda x: _repeated(x, factor=2.0), lambda x: 2 * _plain(2 * _plain(x))),
    "traced": (torch.jit.trace(_plain, X), _plain),
    "module": (torch.jit.script(_Gelu()), _timed),
    "traced module": (torch.jit.trace(_Gelu(), X), _timed),
    "frozen module": (torch.jit.freeze(torch.jit.script(_Gelu()).eval()), _timed),
    "loaded module": (_loaded(), _timed),
    "within a module": (nn.Sequential(nn.Identity(), torch.jit.script(_Gelu())), _timed),
    "class": (_Activation(TIMES).act, _timed),
    "interface of a module": (torch.jit.script(_Open()), _timed),
}


def _loss(f, w: Tensor) -> Tensor:
    return f(X @ w).square().sum()


def _run(f, times: int = 3) -> None:
    for _ in range(times):
        w = W.clone().requires_grad_()
        _loss(f, w).backward()


@pytest.mark.parametrize(("f", "plain"), CASES.values(), ids=CASES)
def test_after_runs_with_gradients(f, plain):
    expected = torch.autograd.functional.hvp(lambda w: _loss(plain, w), W, V)[1]
    slope = (torch.autograd.functional.jacobian(lambda w: _loss(plain, w), W) * V).sum()
    for _ in range(3):
        _run(f)
        torch.testing.assert_close(imstep.hvp(lambda w: _loss(f, w), W, V), expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(imstep.jvp(lambda w: _loss(f, w), (W,), (V,))[1], slope, rtol=1e-12, atol=1e-13)
        p = W.clone().requires_grad_()
        product = imstep.Hessian(lambda p=p: _loss(f, p), [p]) @ V.flatten()
        torch.testing.assert_close(product, expected.flatten(), rtol=1e-12, atol=1e-13)


def test_what_is_optimised_stays_so():
    _run(_gelu)
    imstep.hvp(lambda w: _loss(_gelu, w), W, V)
    assert "DifferentiableGraph" in _gelu(X.clone().requires_grad_()).grad_fn.name()


def test_wrong_arguments_are_told_by_torchscript():
    for call in (lambda w: _repeated(w, 1, 1.0, 1), lambda w: _repeated(w, of=3), lambda w: _repeated(times=2)):
        with pytest.raises(RuntimeError, match="_repeated"):
            imstep.jvp(call, (W,), (V,))
    assert torch._C.ScriptFunction.__call__ is _repeated.__class__.__call__
    assert torch.equal(_repeated(x=W, times=1), _plain(W))


@pytest.mark.parametrize(
    ("f", "message"),
    [(lambda x: _by_interface(_Activation(TIMES), x), "jit.interface.*Name the class"), (_forked, "without fork")],
    ids=["interface", "fork"],
)
def test_what_runs_by_plans_or_threads_of_its_own_is_refused(f, message):
    _run(f)
    p = W.clone().requires_grad_()
    with pytest.raises(imstep.UnsupportedOperatorError, match=message):
        imstep.hvp(lambda w: _loss(f, w), W, V)
    with pytest.raises(imstep.UnsupportedOperatorError, match=message):
        imstep.Hessian(lambda: _loss(f, p), [p])


def test_other_threads_run_what_is_optimised():
    """While a function is differentiated in this one."""
    _run(_gelu)
    found = []

    def other() -> None:
        found.append(_gelu(X.clone().requires_grad_()).grad_fn.name())

    @torch.library.custom_op("scripted::waiting", mutates_args=())
    def waiting(x: Tensor) -> Tensor:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return x.clone()

    def f(w: Tensor) -> Tensor:
        waiting(X)
        return _loss(_gelu, w)

    expected = torch.autograd.functional.hvp(lambda w: _loss(_plain, w), W, V)[1]
    torch.testing.assert_close(imstep.hvp(f, W, V), expected, rtol=1e-12, atol=1e-13)
    assert "DifferentiableGraph" in found[0]


@pytest.mark.parametrize("optimizer", [imstep.NewtonKrylov, imstep.LeastSquares])
def test_steps_are_those_without_it(optimizer):
    class Net(nn.Module):
        def __init__(self, act) -> None:
            super().__init__()
            draw = torch.Generator().manual_seed(1)
            self.first = nn.Parameter(torch.randn(4, 6, generator=draw, dtype=torch.float64))
            self.last = nn.Parameter(torch.randn(6, 1, generator=draw, dtype=torch.float64))
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x @ self.first) @ self.last

    found = []
    for act in (_plain, torch.jit.script(_Plain()), torch.jit.trace(_plain, torch.ones(5, 6).double())):
        net = Net(act)
        steps = optimizer(net.parameters())
        loss = lambda net=net: (net(X) - X.prod(1, keepdim=True)).square().mean()
        found.append([steps.step(loss).item() for _ in range(6)])
    torch.testing.assert_close(torch.tensor(found[1:]), torch.tensor(found[:1] * 2), rtol=1e-6, atol=1e-20)
