"""Quasi-Newton steps: their directions are the textbook's, they make no products, they refuse what is too large."""

from __future__ import annotations

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal, rosenbrock
from torch import Tensor, nn

from imstep import NewtonKrylov, methods
from imstep.globalization import NoDamping, StrongWolfe
from imstep.optim import (
    BFGS,
    SR1,
    Cost,
    ExactHessian,
    LearntModel,
    LimitedMemoryBFGS,
    PreconditionedGradient,
    RankOneModel,
    SelfScaledBroyden,
)


def textbook_bfgs(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    V = torch.eye(len(s), dtype=F64) - torch.outer(y, s) / (y @ s)
    return V.T @ H @ V + torch.outer(s, s) / (y @ s)


def textbook_direction(pairs: list[tuple[Tensor, Tensor]], g: Tensor, pairs_kept: int | None) -> Tensor:
    """From the scaled identity: Nocedal and Wright, (6.20) for all pairs, (7.20) for the last."""
    if not pairs:
        return -g / g.norm()
    kept = pairs if pairs_kept is None else list(deque(pairs, maxlen=pairs_kept))
    s, y = kept[0] if pairs_kept is None else kept[-1]
    H = (s @ y) / (y @ y) * torch.eye(len(g), dtype=F64)
    for s, y in kept:
        H = textbook_bfgs(H, s, y)
    return -H @ g


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("name", "kept"), [("bfgs", None), ("lbfgs", 3)])
def test_directions_are_the_textbook_s(name: str, kept: int | None, exact: bool) -> None:
    w = nn.Parameter(torch.tensor([-1.2, 1.0, 0.7, -0.3], dtype=F64))
    options = {} if kept is None else {"pairs": kept}
    optimizer = getattr(methods, name)([w], exact=exact, **options)
    pairs: list[tuple[Tensor, Tensor]] = []
    for _ in range(12):
        at = w.detach().clone()
        (g,) = torch.autograd.grad(rosenbrock(w), w)
        optimizer.step(lambda: rosenbrock(w))
        expected, move = textbook_direction(pairs, g, kept), w.detach() - at
        assert optimizer.last_step.direction_norm == pytest.approx(float(expected.norm()), rel=1e-6)
        assert float(move @ expected) == pytest.approx(float(move.norm() * expected.norm()), rel=1e-9)
        (new,) = torch.autograd.grad(rosenbrock(w), w)
        y = torch.func.hessian(rosenbrock)(w.detach()) @ move if exact else new - g
        if y @ move > 0:
            pairs.append((move, y))


def test_a_step_evaluates_plain_gradients_only() -> None:
    net = network()
    for name in ("bfgs", "lbfgs", "self_scaled_broyden"):
        optimizer = getattr(methods, name)(net.parameters())
        for step in range(6):
            optimizer.step(lambda: F.cross_entropy(net(X), LABELS))
            record = optimizer.last_step
            assert record.cost == Cost(gradients=1 + record.trials, losses=int(step == 0))  # the first looks twice


@pytest.mark.parametrize("name", ["bfgs", "lbfgs", "self_scaled_broyden"])
def test_exact_products_learn_over_changing_batches(name: str) -> None:
    """On a quadratic with batches that shift its minimum, differences know nothing and products all."""
    root = normal(6, 6)
    A = root @ root.T + torch.eye(6, dtype=F64)
    w = nn.Parameter(torch.zeros(6, dtype=F64))
    optimizer = getattr(methods, name)([w], exact=True)
    for step in range(60):
        b = normal(6, seed=step)
        optimizer.step(lambda b=b: w @ (A @ w) / 2 - b @ w)
    g = normal(6, seed=99)
    P = optimizer._preconditioner.operator(0.0)
    model = g @ (P @ g)
    assert float(model) == pytest.approx(float(g @ torch.linalg.solve(A, g)), rel=0.2)


@pytest.mark.parametrize("kind", [BFGS(), SR1(), SelfScaledBroyden(), SelfScaledBroyden(theta=0.0)])
def test_they_converge_superlinearly(kind: object) -> None:
    w = nn.Parameter(torch.tensor([-1.2, 1.0, 0.7, -0.3], dtype=F64))
    optimizer = NewtonKrylov(
        [w],
        curvature=ExactHessian(),
        solver=PreconditionedGradient(products=False),
        preconditioning=kind,
        step=StrongWolfe(),
        damping=NoDamping(),
    )
    norms = []
    for _ in range(120):
        optimizer.step(lambda: rosenbrock(w))
        norms.append(optimizer.last_step.gradient_norm)
        if norms[-1] < 1e-11:
            break
    assert norms[-1] < 1e-11
    assert norms[-1] < 1e-2 * norms[-3]


def test_a_momentum_or_damping_records_the_products_it_needs() -> None:
    net = network()
    optimizer = methods.lbfgs(net.parameters(), momentum=True)
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(net(X), LABELS))
    assert optimizer.cost.linearisations == 3


def test_learning_rates_record_late() -> None:
    """A product that only a group's rate asks for is made from a record on demand, and counted."""
    w, v = (nn.Parameter(normal(3, seed=s)) for s in (1, 2))
    optimizer = methods.bfgs([{"params": [w], "lr": 0.5}, {"params": [v]}])
    for _ in range(4):
        before = optimizer.cost
        optimizer.step(lambda: (w**2).sum() + ((v - w) ** 4).sum())
        assert optimizer.cost.linearisations == before.linearisations + 1


def test_a_stationary_start_is_looked_at_by_products() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = methods.bfgs([w])
    optimizer.step(lambda: (w[0] ** 2 - 1) ** 2 / 4 + w[1] ** 2)
    assert optimizer.cost.linearisations == 1
    assert abs(float(w.detach()[0])) > 0.5


@pytest.mark.parametrize("name", ["bfgs", "lbfgs", "self_scaled_broyden"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_units_of_the_loss_do_not_matter_in_single_precision(name: str, scale: float) -> None:
    w = nn.Parameter(torch.tensor([-1.2, 1.0]))
    optimizer = getattr(methods, name)([w])
    for _ in range(80):
        optimizer.step(lambda: scale * rosenbrock(w))
    assert float(rosenbrock(w).detach()) < 1e-6


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"keeps a matrix .* LimitedMemoryBFGS\(\), or pass limit=7"):
        NewtonKrylov([nn.Parameter(torch.zeros(7))], preconditioning=BFGS(limit=6))
    for make in (lambda: BFGS(limit=0), lambda: SelfScaledBroyden(theta=2.0), lambda: LimitedMemoryBFGS(pairs=0)):
        with pytest.raises(ValueError, match="got"):
            make()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["sr1", "lsr1"])
def test_rank_one_steps_are_those_of_the_model_within_its_radius(name: str, exact: bool) -> None:
    """Against the updates one by one, and Moré's and Sorensen's conditions on the step."""
    w = nn.Parameter(torch.tensor([-1.2, 1.0, 0.7, -0.3], dtype=F64))
    optimizer = getattr(methods, name)([w], exact=exact, **({"pairs": 2} if name == "lsr1" else {}))
    pairs: list[tuple[Tensor, Tensor]] = []
    for _ in range(12):
        at = w.detach().clone()
        (g,) = torch.autograd.grad(rosenbrock(w), w)
        optimizer.step(lambda: rosenbrock(w))
        record, move = optimizer.last_step, w.detach() - at
        B = textbook_model(pairs, g, 2 if name == "lsr1" else None)
        d = move / record.step_length
        # B d + g = -μ d with μ >= 0, and 0 inside the radius; B + μI semidefinite.
        mu = -float(d @ (B @ d + g)) / float(d @ d)
        assert float((B @ d + g + mu * d).norm()) <= 1e-3 * float(g.norm())
        inside = record.direction_norm < 0.99 * record.radius
        assert mu > -1e-6 * float(B.norm())
        assert not inside or abs(mu) < 1e-3 * float(B.norm())
        assert float(torch.linalg.eigvalsh(B)[0]) + mu > -1e-3 * float(B.norm())
        if bool(move.any()):
            (new,) = torch.autograd.grad(rosenbrock(w), w)
            y = torch.func.hessian(rosenbrock)(w.detach()) @ move if exact else new - g
            pairs.append((move, y))
    assert optimizer.cost.products == (len(pairs) if exact else 0)  # one for the scale of damping


def textbook_model(pairs: list[tuple[Tensor, Tensor]], g: Tensor, kept: int | None) -> Tensor:
    """SR1 updates one by one, (6.24), from yᵀy/yᵀs of the first pair; the last kept ones, from the last."""
    identity = torch.eye(len(g), dtype=F64)
    curved = [(s, y) for s, y in pairs if s @ y > 0]
    if not pairs:
        return float(g.norm()) * identity
    taken = pairs if kept is None else pairs[-kept:]
    basis = curved[0] if kept is None else next((p for p in reversed(taken) if p[0] @ p[1] > 0), None)
    B = identity if basis is None else (basis[1] @ basis[1]) / (basis[0] @ basis[1]) * identity
    for s, y in taken:
        rest = y - B @ s
        if abs(rest @ s) > 1e-8 * rest.norm() * s.norm():
            B = B + torch.outer(rest, rest) / (rest @ s)
    return B


def test_rank_one_models_leave_a_saddle_without_products() -> None:
    for name in ("sr1", "lsr1"):
        w = nn.Parameter(torch.tensor([1e-2, 0.5], dtype=F64))
        optimizer = getattr(methods, name)([w])
        for _ in range(12):
            optimizer.step(lambda w=w: (w[0] ** 2 - 1) ** 2 / 4 + w[1] ** 2)
        assert float(w.detach()[0].abs()) == pytest.approx(1, abs=1e-6)


def test_a_solver_on_a_learnt_model_needs_one() -> None:
    w = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=F64))
    optimizer = NewtonKrylov([w], solver=LearntModel(), preconditioning=BFGS())
    with pytest.raises(ValueError, match="this one learns none"):
        optimizer.step(lambda: rosenbrock(w))
    with pytest.raises(ValueError, match=r"matrix of the parameters' number squared.*limit=7"):
        NewtonKrylov([nn.Parameter(torch.zeros(7))], preconditioning=RankOneModel(None, limit=6))
