"""Recurrent networks within checkpoints, autocast and on packed sequences; constants within checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import imstep

NETWORKS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12}


def _last(state) -> Tensor:
    return torch.cat([s.flatten() for s in state]) if isinstance(state, tuple) else state


def _plain(module, x):
    y, state = module(x)
    return y.pow(2).sum() + _last(state).sin().sum()


def _checkpointed(module, x):
    y = checkpoint(lambda t: module(t)[0], x, use_reentrant=False)
    return y.pow(2).sum()


def _reentrant(module, x):
    y = checkpoint(lambda t: module(t)[0], x.clone().requires_grad_(), use_reentrant=True)
    return y.pow(2).sum()


def _packed(module, x):
    y, state = module(pack_padded_sequence(x, [5, 3]))
    return pad_packed_sequence(y)[0].pow(2).sum() + _last(state).sin().sum()


def _packed_unsorted(module, x):
    y, state = module(pack_padded_sequence(x, [3, 5], enforce_sorted=False))
    return pad_packed_sequence(y)[0].pow(2).sum() + _last(state).sin().sum()


def _expected(loss, module, x, v: Tensor) -> Tensor:
    """Double backward through PyTorch's own steps, in double precision."""
    module, x, v = module.double(), x.double(), v.double()
    parameters = list(module.parameters())
    with torch.backends.mkldnn.flags(enabled=False):
        gradients = torch.autograd.grad(loss(module, x), parameters, create_graph=True)
        slope = torch.cat([g.flatten() for g in gradients]) @ v
        return torch.cat([p.flatten() for p in torch.autograd.grad(slope, parameters)])


def _setting(name: str, dtype: torch.dtype, **options):
    torch.manual_seed(0)
    return NETWORKS[name](3, 4, **options).to(dtype), torch.randn(5, 2, 3, dtype=dtype)


def _closure(loss, module, x):
    def closure():
        module.zero_grad()
        value = loss(module, x)
        value.backward()  # a re-entrant checkpoint knows nothing else
        return value

    return closure


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "four"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("loss", [_plain, _checkpointed, _reentrant, _packed, _packed_unsorted])
def test_products(loss, name, dtype, options):
    module, x = _setting(name, dtype, **options)
    hessian = imstep.Hessian(_closure(loss, module, x), module)
    v = torch.randn(hessian.size, dtype=dtype)
    found = (hessian @ v).double()
    same = (lambda m, t: m(t)[0].pow(2).sum()) if loss in (_checkpointed, _reentrant) else loss
    expected = _expected(same, module, x, v)
    assert (found - expected).norm() < DTYPES[dtype] * expected.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast(name):
    """As far as bfloat16 carries."""
    module, x = _setting(name, torch.float32)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)[0]
        return y.float().pow(2).sum()

    hessian = imstep.Hessian(loss, module)
    v = torch.randn(hessian.size)
    found = (hessian @ v).double()
    expected = _expected(lambda m, t: m(t)[0].pow(2).sum(), module, x, v)
    assert (found - expected).norm() < 0.03 * expected.norm()


def _detaches(t: Tensor) -> Tensor:
    return t.sin() * t.detach().square()


def _without_grad(t: Tensor) -> Tensor:
    with torch.no_grad():
        scale = t.exp()
    return t.sin() * scale


def _set_off(t: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        scale = t.exp()
    torch.set_grad_enabled(False)
    shift = t.square()
    torch.set_grad_enabled(True)
    return t.sin() * scale + t * shift


@torch.no_grad()
def _scale(t: Tensor) -> Tensor:
    with torch.no_grad():
        inner = t.cos()
    return t.exp() * inner


def _decorated(t: Tensor) -> Tensor:
    with torch.enable_grad():
        inner = t.sin()
    return inner * _scale(t)


def _derivative_inside(t: Tensor) -> Tensor:
    u = t.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(u.sin().sum(), u)
        (moving,) = torch.autograd.grad(t.exp().sum(), t, create_graph=True)
    return t.square() * slope * moving


BLOCKS = [_detaches, _without_grad, _set_off, _decorated]


def _twice(f, w: Tensor, v: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(f(w), w, create_graph=True)
    return torch.autograd.grad(g @ v, w)[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_constants_within_a_checkpoint_are_constants(block, reentrant):
    """As without it, also when it is run again in the backward pass."""
    w, v = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    found = imstep.Hessian(_closure(lambda *_: _nest(block, w, reentrant), nn.Tanh(), w), [w]) @ v
    assert torch.allclose(found, _twice(lambda t: block(block(t.sin())).sin().sum(), w, v), rtol=1e-12)


def _nest(block, w: Tensor, reentrant: bool) -> Tensor:
    inner = lambda t: checkpoint(block, t, use_reentrant=reentrant)
    return checkpoint(lambda t: block(inner(t)), w.sin(), use_reentrant=reentrant).sin().sum()


def test_derivatives_within_a_checkpoint():
    w, v = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    loss = lambda t: checkpoint(_derivative_inside, t.sin(), use_reentrant=False).sum()
    found = imstep.Hessian(lambda: loss(w), [w]) @ v
    assert torch.allclose(found, _twice(lambda t: _derivative_inside(t.sin()).sum(), w, v), rtol=1e-12)
