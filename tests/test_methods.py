"""Every known method by name: where it arrives, and what tells it from the others."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.references.sides import CHECKS, Check
from imstep import NewtonKrylov, methods
from imstep.globalization import NoDamping
from imstep.linalg import ShiftedEigenvalues
from imstep.optim import (
    Direct,
    Dogleg,
    GrowingBatches,
    ResidualForcing,
    SteihaugToint,
    TwoDimensionalSubspace,
)

F64 = torch.float64
FIXED_RATES = {"adahessian", "hessian_momentum", "sketchy_sgd", "sketchy_svrg", "sophia"}
FIXED_RATES |= {"shampoo", "soap", "kl_shampoo"}
"""Tested in tests/optim/test_{diagonal_newton,shampoo}.py and below."""


def rosenbrock() -> tuple[nn.Parameter, object]:
    w = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=F64))
    return w, lambda: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def saddle() -> tuple[nn.Parameter, object]:
    """f = (x² - 1)²/4 + y²: a saddle at the origin, minima at (±1, 0)."""
    w = nn.Parameter(torch.tensor([1e-3, 0.5], dtype=F64))
    return w, lambda: (w[0] ** 2 - 1) ** 2 / 4 + w[1] ** 2


def regression() -> tuple[nn.Module, object]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 5, generator=generator, dtype=F64)
    y = (X @ torch.randn(5, 3, generator=generator, dtype=F64)).argmax(1)
    net = nn.Linear(5, 3).to(F64)
    with torch.no_grad():
        [p.zero_() for p in net.parameters()]
    penalty = lambda: sum(p.square().sum() for p in net.parameters())
    return net, lambda: F.cross_entropy(net(X), y) + 0.01 * penalty()


def run(optimizer: NewtonKrylov, closure: object, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(closure)
        if optimizer.last_step.gradient_norm < 1e-9:
            return


@pytest.mark.parametrize("name", sorted(set(methods.__all__) - FIXED_RATES))
def test_each_method_finds_the_minimum_of_a_logistic_regression(name: str) -> None:
    net, closure = regression()
    optimizer = getattr(methods, name)(net.parameters())
    run(optimizer, closure, 60)
    gradient = torch.autograd.grad(closure(), tuple(net.parameters()))
    assert math.sqrt(sum(float(g.square().sum()) for g in gradient)) < 1e-5, name


@pytest.mark.parametrize("name", ["newton", "newton_cg", "newton_mr", "trust_region", "cubic_regularization",
                                  "saddle_free_newton", "shifted_newton", "block_bfgs"])  # fmt: skip
@pytest.mark.parametrize("start", [rosenbrock, saddle])
def test_methods_of_the_hessian_solve_what_is_not_convex(name: str, start: object) -> None:
    w, closure = start()
    optimizer = getattr(methods, name)([w])
    run(optimizer, closure, 120)
    assert float(closure().detach()) < 1e-12


@pytest.mark.parametrize("solver", [SteihaugToint(), Dogleg(), TwoDimensionalSubspace(), Direct()])
def test_a_trust_region_with_any_solver(solver: object) -> None:
    w, closure = rosenbrock()
    optimizer = methods.trust_region([w], solver=solver)
    run(optimizer, closure, 60)
    assert float(closure().detach()) < 1e-15


def first_move(make: object, w: Tensor, closure: object) -> Tensor:
    before = w.detach().clone()
    make([w]).step(closure)
    return w.detach() - before


def test_newton_takes_what_its_rule_makes_of_eigenvalues() -> None:
    H = torch.tensor([[-0.75, 0.0], [0.0, 2.0]], dtype=F64)
    g = torch.tensor([-0.375 + 0.0, 1.0], dtype=F64)
    quadratic = lambda w: g @ w + w @ H @ w / 2 + 10 * w[0] ** 4
    for rule, theta in ((None, [0.75, 2.0]), (ShiftedEigenvalues(least=0.5), [1.0, 3.75])):
        w = nn.Parameter(torch.zeros(2, dtype=F64))
        move = first_move(lambda p, rule=rule: methods.newton(p, rule), w, lambda w=w: quadratic(w))
        expected = -g / torch.tensor(theta, dtype=F64)
        assert float(move @ expected) == pytest.approx(float(move.norm() * expected.norm()))


@pytest.mark.parametrize("fisher", ["exact", "monte-carlo", "empirical"])
def test_natural_gradients_take_the_direction_of_their_matrix(fisher: str) -> None:
    """F⁻¹ g by hand, from gradients of single cases; for drawn labels in the mean over seeds only."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(80, 3, generator=generator, dtype=F64), torch.randint(2, (80,), generator=generator).to(F64)
    w = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=F64))
    p = (X @ w).sigmoid().detach()
    g = X.T @ (p - y) / 80
    weights = (p - y) ** 2 if fisher == "empirical" else p * (1 - p)
    expected = -torch.linalg.solve(X.T @ (weights[:, None] * X) / 80, g)
    options = {"damping": NoDamping(), "forcing": ResidualForcing(eta=1e-12)}
    moves = []
    for seed in range(30 if fisher == "monte-carlo" else 1):
        v = nn.Parameter(w.detach().clone())
        make = lambda params, seed=seed: methods.natural_gradient(params, fisher, seed, **options)
        loss = lambda v=v: F.binary_cross_entropy_with_logits(X @ v, y)
        moves.append(first_move(make, v, loss))
    move = torch.stack(moves).mean(0)
    cosine = float(move @ expected / (move.norm() * expected.norm()))
    assert cosine > (0.98 if fisher == "monte-carlo" else 1 - 1e-12)
    assert fisher != "monte-carlo" or not torch.equal(moves[0], moves[1])


def test_other_words_for_a_fisher_matrix_and_losses_that_are_no_likelihood_are_refused() -> None:
    w = nn.Parameter(torch.ones(2, dtype=F64))
    with pytest.raises(ValueError, match="'exact', 'monte-carlo', 'empirical', or an Expectation; got 'mc'"):
        methods.natural_gradient([w], "mc")
    with pytest.raises(TypeError, match="must be an Expectation"):
        methods.natural_gradient([w], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not recognised as one"):
        methods.natural_gradient([w]).step(lambda: w.sin().sum())


def test_kfac_takes_the_best_length_along_its_direction() -> None:
    """On a quadratic model with exact factors the first step is Newton's."""
    X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    y = X @ torch.randn(4, 1, generator=torch.Generator().manual_seed(2), dtype=F64)
    net = nn.Linear(4, 1, bias=False).to(F64)
    closure = lambda: F.mse_loss(net(X), y)
    optimizer = methods.kfac(net.parameters())
    start = float(closure().detach())
    optimizer.step(closure)
    assert optimizer.last_step.rho == pytest.approx(1.0)
    run(optimizer, closure, 60)
    assert float(closure().detach()) < 1e-9 * start
    assert optimizer.cost.gauss_newton_products <= 2 * 61


def examples() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(200, 6, generator=generator, dtype=F64) * torch.logspace(0, -1, 6, dtype=F64)
    y = (X.sum(1) + 0.3 * torch.randn(200, generator=generator, dtype=F64) > 0).to(F64)
    net = nn.Linear(6, 1).to(F64)
    with torch.no_grad():
        [p.zero_() for p in net.parameters()]
    return net, X, y


def test_sketchy_sgd_and_svrg_find_their_rate_themselves() -> None:
    """Batches leave SGD at a level of noise; with variance reduction there is none."""
    ends = []
    for reduces in (False, True):
        net, X, y = examples()
        loss = lambda at=slice(None): F.binary_cross_entropy_with_logits(net(X[at])[:, 0], y[at]) + sum(  # noqa: B023
            0.01 * p.square().sum() for p in net.parameters()  # noqa: B023
        )
        of = partial(methods.sketchy_svrg, full=loss, snapshot_every=10) if reduces else methods.sketchy_sgd
        optimizer = of(net.parameters(), rank=7, every=20)
        for i in range(40):
            batch = lambda at=slice(40 * (i % 5), 40 * (i % 5) + 40): loss(at)  # noqa: B023
            optimizer.step(batch)
        gradient = torch.autograd.grad(loss(), tuple(net.parameters()))
        ends.append(math.sqrt(sum(float(g.square().sum()) for g in gradient)))
    assert ends[1] < 3e-4 < 5e-3 < ends[0] < 0.05


def test_subsampled_newton_measures_what_growing_batches_need() -> None:
    for name in ("subsampled_newton", "stochastic_cubic"):
        net, X, y = examples()
        optimizer = getattr(methods, name)(net.parameters())
        batches = GrowingBatches(len(X), size=10, window=2)
        for _ in range(4):
            for at in batches:
                optimizer.step(lambda: F.binary_cross_entropy_with_logits(net(X[at])[:, 0], y[at]))  # noqa: B023
                batches.observe(optimizer.last_step, len(at))
        assert batches.size > 20, name


@pytest.mark.parametrize("check", [c for c in CHECKS if c.package == "SciPy"], ids=lambda c: f"{c.method}, {c.other}")
def test_steps_are_those_of_other_packages(check: Check) -> None:
    """The rest, of packages that tests do not install: ``python -m benchmarks.references``."""
    assert check.difference() <= check.tolerance
