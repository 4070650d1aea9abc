"""Quasi-Newton steps between Newton steps."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal
from torch import Tensor, nn

from imstep import NewtonKrylov, methods
from imstep.optim import Cost, ExactHessian, MinimalResidual, QuasiNewtonSteps
from imstep.optim.memory import BetweenHistory
from imstep.optim.record import StepRecord


def chain(w: Tensor) -> Tensor:
    """Rosenbrock's function of many variables: a model of second order holds nearby only."""
    return (100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).mean()


def descend(optimizer: NewtonKrylov, closure: Any, budget: float) -> list[StepRecord]:
    records = []
    while optimizer.cost.gradient_equivalents < budget:
        optimizer.step(closure)
        assert optimizer.last_step is not None
        records.append(optimizer.last_step)
    return records


def started(**options: Any) -> tuple[nn.Parameter, NewtonKrylov]:
    w = nn.Parameter(-torch.ones(40, dtype=F64) + 0.1 * normal(40))
    return w, NewtonKrylov([w], **options)


def test_they_come_further_where_newton_steps_are_short() -> None:
    w, plain = started()
    descend(plain, lambda: chain(w), 300)
    v, enriched = started(between=QuasiNewtonSteps(pairs=30, always=True))
    records = descend(enriched, lambda: chain(v), 300)
    assert sum(r.quasi_newton for r in records) > 20
    assert chain(v) < 0.5 * chain(w)


def mixture(seed: int) -> tuple[list[nn.Parameter], Any]:
    """Penalised likelihood of a mixture of six normal densities: its Hessian is indefinite until the end."""
    clusters = [normal(60, 2, seed=k) * s + torch.tensor(c, dtype=F64) for k, (s, c) in enumerate(CLUSTERS)]
    x = torch.cat(clusters)
    places = nn.Parameter(normal(6, 2, seed=10 + seed))
    rates, weights = nn.Parameter(torch.zeros(6, 2, dtype=F64)), nn.Parameter(torch.zeros(6, dtype=F64))

    def closure() -> Tensor:
        squares = ((x[:, None] - places) * rates.exp()).square().sum(2)
        logarithms = weights.log_softmax(0) + rates.sum(1) - 0.5 * squares
        return -torch.logsumexp(logarithms, 1).mean() + 1e-3 * rates.square().sum()

    return [places, rates, weights], closure


CLUSTERS = ((0.3, (0.0, 0.0)), (0.5, (2.0, 1.0)), (0.2, (-1.0, 2.0)), (0.4, (1.0, -2.0)))


def test_by_default_they_follow_disturbing_directions() -> None:
    """And more is gained for the same price, on most seeds by far."""
    ratios = []
    for seed in range(5):
        ends = []
        for options in ({}, {"between": None}):
            parameters, closure = mixture(seed)
            records = descend(NewtonKrylov(parameters, **options), closure, 50)
            for last, record in pairwise(records):
                assert not record.quasi_newton or last.quasi_newton or last.status.disturbing
            assert any(r.quasi_newton for r in records) == (not options)
            ends.append(records[-1].new_loss)
        ratios.append(ends[0] / ends[1])
    assert sorted(ratios)[2] < 0.6


def test_nothing_is_learnt_where_no_direction_disturbs() -> None:
    model = network()
    optimizer = NewtonKrylov(model.parameters())
    descend(optimizer, lambda: F.cross_entropy(model(X), LABELS), 60)
    assert optimizer._secants.state_dict() == {"at": None, "at_gradient": None, "secants": []}


def test_a_state_without_them_is_taken_up() -> None:
    parameters, closure = mixture(0)
    optimizer = NewtonKrylov(parameters, between=None)
    descend(optimizer, closure, 20)
    other = NewtonKrylov(parameters)
    other.load_state_dict(optimizer.state_dict())
    assert any(r.quasi_newton for r in descend(other, closure, 60))


@pytest.mark.parametrize("options", [{"curvature": ExactHessian()}, {"solver": MinimalResidual()}])
def test_by_default_none_where_another_method_is_chosen(options: dict[str, Any]) -> None:
    parameters, closure = mixture(0)
    records = descend(NewtonKrylov(parameters, **options), closure, 100)
    assert any(r.status.disturbing for r in records)
    assert not any(r.quasi_newton for r in records)


def test_newton_steps_remain_where_they_do_better() -> None:
    model = network()
    closure = lambda: F.cross_entropy(model(X), LABELS) + 1e-3 * sum((p**2).sum() for p in model.parameters())
    optimizer = NewtonKrylov(model.parameters(), between=QuasiNewtonSteps(always=True))
    records = descend(optimizer, closure, 700)
    assert records[-1].gradient_norm < 1e-10
    last = [r for r in records if r.accepted][-3:]
    assert not any(r.quasi_newton for r in last)


@pytest.mark.parametrize("hold", [False, True])
def test_records_and_costs_are_those_of_what_happened(hold: bool) -> None:
    w, optimizer = started(between=QuasiNewtonSteps(always=True))
    mask = torch.ones_like(w).index_fill_(0, torch.tensor([3, 7]), 0.0 if hold else 1.0)
    if hold:
        w.register_hook(lambda g: mask * g)
    calls, total, kinds = 0, Cost(), set()

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return chain(w)

    for _ in range(60):
        before, calls = w.detach().clone(), 0
        (gradient,) = torch.autograd.grad(chain(w), [w])
        optimizer.step(closure)
        record, moved = optimizer.last_step, w.detach() - before
        assert calls == record.cost.linearisations + record.cost.gradients + record.cost.losses
        assert record.new_loss == pytest.approx(float(chain(w)), rel=1e-13)
        assert not bool((moved * (1 - mask)).any())
        if record.quasi_newton:
            assert record.status is None
            assert record.products == 0
            assert record.cost.gradients == 1
            assert record.slope * record.step_length == pytest.approx(float(gradient @ moved), rel=1e-9)
            assert record.new_loss < record.loss
        kinds.add(record.quasi_newton)
        total += record.cost
    assert kinds == {False, True}
    assert optimizer.cost == total


def test_a_saved_optimizer_goes_on_bit_for_bit() -> None:
    w, optimizer = started(between=QuasiNewtonSteps(pairs=5, always=True))
    for _ in range(25):
        optimizer.step(lambda: chain(w))
    v = nn.Parameter(w.detach().clone())
    other = NewtonKrylov([v], between=QuasiNewtonSteps(pairs=5, always=True))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(15):
        assert torch.equal(optimizer.step(lambda: chain(w)), other.step(lambda: chain(v)))
    assert torch.equal(w, v)


def test_an_exception_in_one_leaves_everything_as_it_was() -> None:
    w, optimizer = started(between=QuasiNewtonSteps(always=True))
    while not optimizer._memory.between.due:
        optimizer.step(lambda: chain(w))
    before, state, calls = w.detach().clone(), copy.deepcopy(optimizer.state_dict()), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return chain(w)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(w, before)
    v = nn.Parameter(before.clone())
    other = NewtonKrylov([v], between=QuasiNewtonSteps(always=True))
    other.load_state_dict(state)
    for _ in range(5):
        assert torch.equal(optimizer.step(lambda: chain(w)), other.step(lambda: chain(v)))


def test_none_on_batches() -> None:
    """Each step is on another function, whose changes of the gradient tell nothing."""
    steps = {}
    for between in (None, QuasiNewtonSteps(always=True)):
        model = network()
        optimizer = NewtonKrylov(model.parameters(), between=between)
        batches = torch.randperm(len(X), generator=torch.Generator().manual_seed(0)).split(10)
        for batch in batches * 3:
            optimizer.step(lambda batch=batch, model=model: F.cross_entropy(model(X[batch]), LABELS[batch]))
            assert not optimizer.last_step.quasi_newton
        steps[between] = [p.detach() for p in model.parameters()], optimizer.cost
    (a, cost), (b, other) = steps.values()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert cost == other


@pytest.mark.parametrize("options", [{"lr": 0.5}, {"momentum": True}])
def test_none_where_a_newton_step_is_not_taken_whole(options: dict[str, Any]) -> None:
    w, optimizer = started(between=QuasiNewtonSteps(always=True), **options)
    assert not any(r.quasi_newton for r in descend(optimizer, lambda: chain(w), 150))


def test_no_step_is_longer_than_allowed() -> None:
    w, optimizer = started(between=QuasiNewtonSteps(always=True), max_step_norm=0.05)
    records = descend(optimizer, lambda: chain(w), 200)
    assert any(r.quasi_newton for r in records)
    assert max(r.step_norm for r in records) <= 0.05 * (1 + 1e-9)


def test_when_they_are_due() -> None:
    history = BetweenHistory().after_newton(8.0, 8.0, True, True, 8)
    assert history.due
    kept = history.after_quasi_newton(2.0, 1.0)
    assert kept.due  # a better rate, within the Newton step's price
    assert not kept.after_quasi_newton(20.0, 7.5).due  # which is spent
    assert not kept.after_quasi_newton(0.5, 1.0).due  # a worse rate
    better = kept.after_quasi_newton(0.0, 1.0).after_newton(4.0, 8.0, True, True, 8)
    assert better.due
    assert better.share == 2
    waits, failing = [], history
    for _ in range(5):
        failing = failing.after_quasi_newton(0.0, 2.0).after_newton(8.0, 8.0, True, True, 8)
        waits.append(failing.wait)
        while failing.wait:
            failing = failing.after_newton(8.0, 8.0, True, True, 8)
    assert waits == [1, 2, 4, 8, 8]


def test_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        QuasiNewtonSteps(pairs=0)
    optimizer = methods.enriched_newton([nn.Parameter(torch.ones(2))], pairs=4)
    assert "between=QuasiNewtonSteps(pairs=4, always=True)" in repr(optimizer)
