"""Parameters that come and go, saved states, and copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal, rosenbrock
from torch import nn

from imstep import methods
from imstep.globalization import LevenbergMarquardt, NoDamping
from imstep.optim import (
    SOAP,
    BlockBFGS,
    EarlierDraws,
    KLShampoo,
    Kronecker,
    KroneckerEigenbasis,
    LeastSquares,
    NewtonKrylov,
    NoPreconditioning,
    Shampoo,
    TikhonovDamping,
)
from imstep.optim.stepwise import StepwiseOptimizer

# --- parameters that come and go ----------------------------------------------------------------------------------


def test_groups_can_be_added() -> None:
    a, b = nn.Parameter(normal(2)), nn.Parameter(normal(3, seed=1))
    optimizer = NewtonKrylov([a])
    loss = lambda: ((a - 1) ** 4).sum() + ((b - 2) ** 2).sum()
    optimizer.step(loss)
    before = b.detach().clone()
    assert torch.equal(b, before)
    optimizer.add_param_group({"params": [b]})
    for _ in range(30):
        optimizer.step(loss)
    torch.testing.assert_close(b.detach(), torch.full((3,), 2.0, dtype=F64), rtol=0, atol=1e-6)


def test_parameters_can_be_frozen_and_thawed() -> None:
    model = network()
    closure = lambda: F.cross_entropy(model(X), LABELS)
    optimizer = NewtonKrylov(model.parameters())
    optimizer.step(closure)
    model[0].requires_grad_(False)
    kept = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, kept)
    model[0].requires_grad_(True)
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, kept)


@pytest.mark.parametrize("kind", [NewtonKrylov, NewtonKrylov.for_batches, LeastSquares])
def test_parameters_can_be_converted_and_grow(kind: Callable[..., StepwiseOptimizer]) -> None:
    """As by ``model.float()`` for a first phase and ``model.double()`` for the last digits; memory begins afresh."""
    model = network()
    optimizer = kind(model.parameters())
    targets = normal(len(X), 3, seed=3)
    closure = lambda: F.mse_loss(model(X.to(model[0].weight.dtype)), targets.to(model[0].weight.dtype))
    for dtype in (F64, torch.float32, torch.bfloat16, F64):
        model.to(dtype)
        losses = [float(optimizer.step(closure)) for _ in range(3)]
        assert all(p.dtype is p.grad.dtype is dtype for p in model.parameters())
    first, last = model[0], model[-1]
    first.weight.data, first.bias.data = torch.cat([first.weight] * 2).detach(), torch.cat([first.bias] * 2).detach()
    last.weight.data = torch.cat([last.weight] * 2, 1).detach() / 2
    model.zero_grad()
    grown = [float(optimizer.step(closure)) for _ in range(2)]
    assert losses[0] > losses[2] > grown[0] > grown[1]
    again = kind(model.parameters())
    again.load_state_dict(optimizer.state_dict())


def test_all_frozen_later() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = NewtonKrylov([w])
    w.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=False"):
        optimizer.step(lambda: (w**2).sum())


# --- saved states -------------------------------------------------------------------------------------------------


def saved() -> tuple[NewtonKrylov, dict[str, Any]]:
    model = network()
    optimizer = NewtonKrylov(model.parameters())
    optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
    return optimizer, optimizer.state_dict()


def without(state: dict[str, Any], *path: str) -> dict[str, Any]:
    copied = {**state, "newton_krylov": dict(state["newton_krylov"])}
    del copied["newton_krylov"][path[0]]
    return copied


@pytest.mark.parametrize("entry", ["memory", "cost", "preconditioner", "shapes"])
def test_damaged_states_are_refused(entry: str) -> None:
    optimizer, state = saved()
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"this state"):
        optimizer.load_state_dict(without(state, entry))
    assert repr(optimizer.state_dict()) == before


def test_foreign_states_are_refused() -> None:
    optimizer, _ = saved()
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match="not saved by NewtonKrylov"):
        optimizer.load_state_dict(torch.optim.Adam(network().parameters()).state_dict())
    other = NewtonKrylov(nn.Linear(4, 6).to(F64).parameters())
    with pytest.raises(ValueError, match=r"shapes \[\[6, 4\], \[6\]\]"):
        optimizer.load_state_dict(other.state_dict())
    plain = NewtonKrylov(network().parameters(), preconditioning=NoPreconditioning())
    with pytest.raises(ValueError, match="another preconditioning"):
        optimizer.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="another preconditioning"):
        plain.load_state_dict(optimizer.state_dict())
    assert repr(optimizer.state_dict()) == before


def test_damping_is_remembered() -> None:
    w = nn.Parameter(2 * normal(5))
    optimizer = NewtonKrylov([w], damping=LevenbergMarquardt(initial=0.5))
    for _ in range(5):
        optimizer.step(lambda: rosenbrock(w))
    state = optimizer.state_dict()["newton_krylov"]["memory"]
    assert state["damping"] != 0.5
    assert state["steps"] == 5


def test_no_damping_is_none() -> None:
    w = nn.Parameter(2 * normal(5))
    optimizer = NewtonKrylov([w], damping=NoDamping())
    for _ in range(5):
        optimizer.step(lambda: rosenbrock(w))
        assert optimizer.last_step.damping == 0


# --- copies -------------------------------------------------------------------------------------------------------


KINDS: dict[str, Callable[[Any], StepwiseOptimizer]] = {
    "least squares": LeastSquares,
    "recalling": partial(LeastSquares, recall=EarlierDraws()),
    "newton": NewtonKrylov,
    "hessian-free": methods.hessian_free,
    "subspace": partial(methods.randomized_subspace_newton, dimension=4),
    "rank one": methods.sr1,
    "sampled": partial(methods.natural_gradient, fisher="monte-carlo"),
} | {
    type(kind).__name__: partial(NewtonKrylov, preconditioning=kind)
    for kind in (
        Kronecker(damping=TikhonovDamping()),
        KroneckerEigenbasis(),
        Shampoo(),
        SOAP(),
        KLShampoo(),
        BlockBFGS(),
    )
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_as_the_original(kind: str, copied: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = KINDS[kind](model.parameters())

    def after(steps: int, model: nn.Module, optimizer: StepwiseOptimizer) -> list[float]:
        return [float(optimizer.step(lambda: F.mse_loss(model(X), X[:, :3].sin()))) for _ in range(steps)]

    after(3, model, optimizer)
    twin = copied((model, optimizer))
    expected = after(3, model, optimizer)
    assert after(3, *twin) == expected
    assert twin[1].cost == optimizer.cost


MAKERS = {
    "newton_krylov": NewtonKrylov,
    "for_batches": NewtonKrylov.for_batches,
    "least_squares": LeastSquares,
    **{name: getattr(methods, name) for name in ("lbfgs", "kfac", "soap", "adahessian", "halley", "bfgs")},
}


@pytest.mark.parametrize("name", MAKERS)
def test_models_may_be_converted_after_the_optimizer_was_built(name: str) -> None:
    """As by ``model.double()``: before the first step nothing is different, later it begins to learn anew."""

    def taken(early: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        if early:
            model.double()
        optimizer = MAKERS[name](model.parameters())
        model.double()
        return model, optimizer

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        dtype = model[0].weight.dtype
        x = torch.linspace(-1, 1, 24, dtype=dtype).reshape(8, 3)
        for _ in range(3):
            optimizer.step(lambda: (model(x) - x[:, :2].sin()).square().mean())
        assert all(p.dtype == p.grad.dtype == dtype for p in model.parameters())

    (model, optimizer), (other, plain) = taken(early=False), taken(early=True)
    steps(model, optimizer)
    steps(other, plain)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    steps(model.float(), optimizer)
