"""Recurrent networks that stand in for PyTorch's kernels: against double backward through PyTorch's own steps."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import imstep

X = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _check(f, point: dict[str, Tensor], h: float | None = None) -> None:
    torch.manual_seed(4)
    direction = {k: torch.randn_like(t) for k, t in point.items()}
    leaves = {k: t.clone().requires_grad_() for k, t in point.items()}
    with torch.backends.mkldnn.flags(enabled=False):
        gradients = torch.autograd.grad(f(leaves), list(leaves.values()), create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True))
        expected = torch.autograd.grad(slope, list(leaves.values()))
    found = imstep.hvp(f, point, direction, h=h)
    torch.testing.assert_close(list(found.values()), list(expected), rtol=1e-11, atol=1e-13)


def _relu(*sizes: int, **options) -> nn.RNN:
    return nn.RNN(*sizes, nonlinearity="relu", **options)


def _network(kind: type[nn.RNNBase] = nn.LSTM, **options) -> tuple[nn.RNNBase, dict[str, Tensor]]:
    torch.manual_seed(0)
    module = kind(3, 4, **options).double()
    return module, {k: p.detach().clone() for k, p in module.named_parameters()}


@pytest.mark.parametrize("h", [None, 1e-20])
@pytest.mark.parametrize(("layers", "bidirectional"), product((1, 2), (False, True)))
@pytest.mark.parametrize(("bias", "batch_first"), product((True, False), (True, False)))
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, _relu])
def test_variants(kind, layers, bidirectional, bias, batch_first, h):
    dropout = 0.3 if layers > 1 else 0.0
    module, point = _network(
        kind, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first, dropout=dropout
    )
    states = (layers * (1 + bidirectional), 5 if batch_first else 2, 4)
    point |= {"x": X.clone(), "h": torch.rand(states).double(), "c": torch.rand(states).double()}

    def f(q):
        torch.manual_seed(1)  # the dropout mask is drawn as PyTorch draws it
        weights = {k: t for k, t in q.items() if k not in ("x", "h", "c")}
        states = (q["h"], q["c"]) if kind is nn.LSTM else q["h"] * q["c"]
        y, last = functional_call(module, weights, (q["x"], states))
        return y.tanh().pow(2).sum() + sum(s.sin().sum() for s in (last if kind is nn.LSTM else [last]))

    _check(f, point, h)


def _through_input_gradient(module, q):
    x = X.clone().requires_grad_()
    y = functional_call(module, q, (x,))[0]
    slope = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)[0]
    return slope.pow(2).sum() + y.sum()


def _through_transform(module, q):
    return torch.func.grad(lambda x: functional_call(module, q, (x,))[0].pow(2).sum())(X).pow(2).sum()


def _through_checkpoint(module, q):
    return checkpoint(lambda x: functional_call(module, q, (x,))[0], X, use_reentrant=False).pow(2).sum()


def _unbatched(module, q):
    return functional_call(module, q, (X[:, 0],))[0].pow(2).sum()


def _twice(module, q):
    call = lambda *args: functional_call(module, q, args)
    y, state = call(X)
    again, _ = call(X.flip(0), state)
    return (y * again).sum() + again.pow(3).sum()


def _one_step(module, q):
    return functional_call(module, q, (X[:1],))[0].pow(2).sum()


LOSSES = [_through_input_gradient, _through_transform, _through_checkpoint, _unbatched, _twice, _one_step]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("loss", LOSSES)
def test_compositions(loss, kind):
    module, point = _network(kind)
    _check(lambda q: loss(module, q), point)


def test_projections_take_the_original():
    module, point = _network(proj_size=2)
    _check(lambda q: functional_call(module, q, (X,))[0].pow(2).sum(), point)


@pytest.mark.parametrize("h", [None, 1e-20])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells_of_a_gpu(kind, bias, h):
    """The kernels of one step that PyTorch has on GPUs only, as no CPU can run them: against its own on a CPU."""
    module, point = _network(kind, bias=bias)
    states = 2 if kind is nn.LSTMCell else 1
    point |= {f"state {at}": torch.rand(2, 4).double() for at in range(states)}
    fused = torch.ops.aten._thnn_fused_lstm_cell if states == 2 else torch.ops.aten._thnn_fused_gru_cell

    def f(q, step):
        found = [q[f"state {at}"] for at in range(states)]
        for x in X[:2]:
            found = step(q, x, found)
        return sum((s.sin() * (at + 2)).sum() for at, s in enumerate(found))

    def on_gpu(q, x, found):
        gates = x @ q["weight_ih"].T, found[0] @ q["weight_hh"].T
        return fused(*gates, found[-1], q.get("bias_ih"), q.get("bias_hh"))[:states]

    def on_cpu(q, x, found):
        weights = {k: t for k, t in q.items() if "state" not in k}
        made = functional_call(module, weights, (x, tuple(found) if states == 2 else found[0]))
        return list(made) if states == 2 else [made]

    torch.manual_seed(4)
    direction = {k: torch.randn_like(t) for k, t in point.items()}
    found, expected = (imstep.hvp(lambda q, s=s: f(q, s), point, direction, h=h) for s in (on_gpu, on_cpu))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    _check(lambda q: f(q, on_cpu), point, h)
