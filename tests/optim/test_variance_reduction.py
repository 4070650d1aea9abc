"""Variance reduction against the gradient of SVRG, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, normal
from torch import nn

from imstep import Hessian
from imstep.optim import VarianceReduction

X, Y = normal(12, 3, seed=1), normal(12, 2, seed=2)


def test_gradients_are_those_of_svrg_and_curvature_is_the_batch_s() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(F64)
    unused = nn.Parameter(torch.ones(2, dtype=F64))
    parameters = [*net.parameters(), unused]
    loss = lambda at=slice(None): F.mse_loss(net(X[at]), Y[at])
    gradient = lambda at=slice(None): torch.autograd.grad(loss(at), tuple(net.parameters()))
    reduced = VarianceReduction(parameters, loss, every=3)
    for number in range(5):
        at = slice(2 * number, 2 * number + 2)
        if number % 3 == 0:
            snapshot, mean = [p.detach().clone() for p in net.parameters()], gradient()
        here = [p.detach().clone() for p in parameters]
        closure = reduced(lambda: loss(at))  # noqa: B023
        assert all(torch.equal(p, q) for p, q in zip(parameters, here, strict=True))
        found = torch.autograd.grad(closure(), tuple(net.parameters()))
        own = gradient(at)
        with torch.no_grad():
            [p.copy_(q) for p, q in zip(net.parameters(), snapshot, strict=True)]
        anchor = gradient(at)
        with torch.no_grad():
            [p.copy_(q) for p, q in zip(parameters, here, strict=True)]
        for g, a, b, m in zip(found, own, anchor, mean, strict=True):
            torch.testing.assert_close(g, a - b + m)
        H, plain = Hessian(closure, net), Hessian(lambda: loss(at), net)  # noqa: B023
        v = normal(plain.shape[0], seed=number)
        torch.testing.assert_close(H @ v, plain @ v)
        with torch.no_grad():
            [p.add_(0.1 * normal(*p.shape, seed=number)) for p in net.parameters()]
    assert reduced.gradients == 2
    with pytest.raises(ValueError, match="every"):
        VarianceReduction(parameters, loss, every=0)
