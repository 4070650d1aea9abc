"""Variance reduction against the gradient of SVRG, written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imstep import Hessian, NewtonKrylov
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
    assert reduced.gradients == 7  # 5 of batches, 2 of all data, at half of every
    with pytest.raises(ValueError, match="every"):
        VarianceReduction(parameters, loss, every=0)


def test_an_optimizer_counts_its_gradients_saves_its_snapshot_and_follows_frozen_parameters() -> None:
    def made() -> tuple[nn.Linear, NewtonKrylov]:
        net = nn.Linear(3, 2).to(F64)
        with torch.no_grad():
            [p.zero_() for p in net.parameters()]
        full = lambda: F.mse_loss(net(X), Y)
        return net, NewtonKrylov([{"params": net.parameters()}], variance_reduction=VarianceReduction(None, full, 4))

    def steps(net: nn.Linear, optimizer: NewtonKrylov, numbers: range) -> list[int]:
        spent = []
        for i in numbers:
            optimizer.step(lambda: F.mse_loss(net(X[i::4]), Y[i::4]))  # noqa: B023
            spent.append(optimizer.last_step.cost.gradients)
        return spent

    net, optimizer = made()
    assert steps(net, optimizer, range(3)) == [3, 1, 1]
    other, resumed = made()
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    steps(net, optimizer, range(3, 4)), steps(other, resumed, range(3, 4))
    assert torch.equal(net.weight, other.weight)
    net.bias.requires_grad_(False)
    assert steps(net, optimizer, range(2)) == [3, 1]  # a snapshot of what is left
    with pytest.raises(TypeError, match="MicroBatches"):
        optimizer.step([lambda: F.mse_loss(net(X), Y)])
    with pytest.raises(ValueError, match="no parameters were given"):
        VarianceReduction(None, lambda: net.weight.sum(), 4)(lambda: net.weight.sum())


def test_closures_that_call_backward_are_reduced_as_well() -> None:
    ends = []
    for backward in (False, True):
        net = nn.Linear(3, 2).to(F64)
        with torch.no_grad():
            [p.zero_() for p in net.parameters()]

        def closure(i: int, net: nn.Linear = net, backward: bool = backward) -> torch.Tensor:
            net.zero_grad()
            loss = F.mse_loss(net(X[i::4]), Y[i::4])
            if backward:
                loss.backward()
            return loss

        full = lambda net=net: F.mse_loss(net(X), Y)
        optimizer = NewtonKrylov(net.parameters(), variance_reduction=VarianceReduction(None, full, 3))
        for i in range(4):
            optimizer.step(lambda: closure(i))  # noqa: B023
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*ends)


def test_complex_parameters_are_pairs_of_reals() -> None:
    """The term is Re(conj(g) (w - w̃)): at a snapshot it leaves the gradient of all data."""
    w = nn.Parameter(torch.complex(normal(3), normal(3, seed=3)))
    data = torch.complex(normal(6, 3, seed=4), normal(6, 3, seed=5))
    loss = lambda x: ((w - x).abs().square() * (w.real.exp() + 1)).mean()
    closure = VarianceReduction([w], lambda: loss(data), every=4)(lambda: loss(data[:2]))
    torch.testing.assert_close(torch.autograd.grad(closure(), w), torch.autograd.grad(loss(data), w))
    before = w.detach().clone()
    with torch.no_grad():
        w.add_(1 + 2j)
    own = torch.autograd.grad(loss(data[:2]), w)[0]
    found = torch.autograd.grad(closure(), w)[0]
    with torch.no_grad():
        w.copy_(before)
    anchor = torch.autograd.grad(loss(data[:2]), w)[0]
    torch.testing.assert_close(found, own - anchor + torch.autograd.grad(loss(data), w)[0])


@pytest.mark.parametrize("backward", [False, True])
def test_snapshots_leave_statistics_and_random_numbers_as_they_are(backward: bool) -> None:
    """Gradients at other points are none of the model's evaluations, and have the dropout mask of the step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).to(F64)
    twin, full = copy.deepcopy(net), lambda: F.mse_loss(net(X), Y)

    def closure() -> Tensor:
        loss = F.mse_loss(net(X[:6]), Y[:6])
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    optimizer = NewtonKrylov(net.parameters(), variance_reduction=VarianceReduction(None, full, 1))
    state = torch.get_rng_state()
    twin(X[:6])
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(list(net.buffers()), list(twin.buffers()), rtol=1e-14, atol=0)
    # At the snapshot the batch's own gradient cancels, where both have one mask.
    torch.set_rng_state(state)
    expected = torch.autograd.grad(F.mse_loss(twin(X), Y), tuple(twin.parameters()))
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def test_checkpointed_attention_runs_again_as_it_ran_first() -> None:
    def gradient(own) -> Tensor:
        torch.manual_seed(0)
        projection, x = nn.Linear(4, 12), normal(5, 6, 4).float()
        attend = lambda x: F.scaled_dot_product_attention(*projection(x).unsqueeze(1).chunk(3, -1))
        loss = lambda: own(attend, x).square().mean()
        optimizer = NewtonKrylov(projection.parameters(), variance_reduction=VarianceReduction(None, loss, every=2))
        optimizer.step(loss)
        return projection.weight.grad

    expected = gradient(lambda attend, x: attend(x))
    torch.testing.assert_close(gradient(lambda attend, x: checkpoint(attend, x, use_reentrant=False)), expected)
