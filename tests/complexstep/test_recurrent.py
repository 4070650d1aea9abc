"""The LSTM and GRU that stand in for PyTorch's kernels: against double backward through PyTorch's own steps."""

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


def _network(kind: type[nn.RNNBase] = nn.LSTM, **options) -> tuple[nn.RNNBase, dict[str, Tensor]]:
    torch.manual_seed(0)
    module = kind(3, 4, **options).double()
    return module, {k: p.detach().clone() for k, p in module.named_parameters()}


@pytest.mark.parametrize("h", [None, 1e-20])
@pytest.mark.parametrize(("layers", "bidirectional"), product((1, 2), (False, True)))
@pytest.mark.parametrize(("bias", "batch_first"), product((True, False), (True, False)))
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
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


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("loss", [_through_input_gradient, _through_transform, _through_checkpoint, _unbatched])
def test_compositions(loss, kind):
    module, point = _network(kind)
    _check(lambda q: loss(module, q), point)


def test_projections_take_the_original():
    module, point = _network(proj_size=2)
    _check(lambda q: functional_call(module, q, (X,))[0].pow(2).sum(), point)
