"""Preconditioners of an optimizer: what is solved stays, costs are told, seeds decide."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal
from torch import Tensor, nn

from imstep.curvature.parameters import ParameterVector
from imstep.globalization import FixedStep, LevenbergMarquardt, NoDamping
from imstep.linalg import DenseOperator, DiagonalOperator, LinearOperator, conjugate_gradient, nystrom
from imstep.optim import (
    SOAP,
    AutomaticRate,
    ConjugateGradient,
    Cost,
    ExactHessian,
    GeneralizedLanczos,
    Hutchinson,
    KLShampoo,
    Kronecker,
    KroneckerEigenbasis,
    MinimalResidual,
    NewtonKrylov,
    NoPreconditioning,
    Nystrom,
    PreconditionedGradient,
    Recycling,
    ResidualForcing,
    Shampoo,
    Solver,
    SquaredGradients,
    SteihaugToint,
    TikhonovDamping,
)
from imstep.optim.preconditioning import Evidence, Preconditioner, Preconditioning

KINDS: dict[str, Preconditioning] = {
    "none": NoPreconditioning(),
    "kronecker": Kronecker(),
    "kronecker, tikhonov": Kronecker(damping=TikhonovDamping()),
    "kronecker eigenbasis": KroneckerEigenbasis(),
    "hutchinson": Hutchinson(every=3, probes=2),
    "squared gradients": SquaredGradients(),
    "shampoo": Shampoo(),
    "soap": SOAP(),
    "kl-shampoo": KLShampoo(),
    "nystrom": Nystrom(rank=5, every=4),
    "adaptive nystrom": Nystrom(rank=2, every=4, largest=16),
    "recycled": Recycling(Nystrom(rank=3, every=5), pairs=4),
}
FROM_PRODUCTS = {name: KINDS[name] for name in ("hutchinson", "nystrom", "adaptive nystrom", "recycled")}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Preconditioning:
    return KINDS[request.param]


def evidence(matrix: Tensor, gradient: Tensor, damping: float = 0.1) -> Evidence:
    class Point:
        split = penalty = None
        convex = False

    point: Any = Point()
    point.gradient = gradient
    return Evidence(point, None, DenseOperator(matrix), damping)


def test_all_lead_to_the_same_minimiser(kind: Preconditioning) -> None:
    """Ridge logistic regression has one minimiser, found here to rounding by plain Newton steps in closed form."""
    inputs = torch.cat([X, 10 * X[:, :1]], dim=1)
    target = (LABELS == 0).to(F64)
    w = torch.zeros(5, dtype=F64)
    for _ in range(30):
        p = torch.sigmoid(inputs @ w)
        hessian = inputs.T @ (inputs * (p * (1 - p) / 30)[:, None]) + 0.02 * torch.eye(5, dtype=F64)
        w = w - torch.linalg.solve(hessian, inputs.T @ (p - target) / 30 + 0.02 * w)
    v = nn.Parameter(torch.zeros(5, dtype=F64))
    optimizer = NewtonKrylov([v], preconditioning=kind)
    for _ in range(60):
        optimizer.step(lambda: F.binary_cross_entropy_with_logits(inputs @ v, target) + 0.01 * (v**2).sum())
        if optimizer.last_step.gradient_norm < 1e-11:
            break
    torch.testing.assert_close(v.detach(), w, rtol=0, atol=1e-8)


def test_the_preconditioner_is_positive_definite_and_solves_the_same_system(kind: Preconditioning) -> None:
    root = normal(12, 30)
    sizes = torch.logspace(-1, 1, 12, dtype=F64)
    matrix, gradient = sizes[:, None] * (root @ root.T / 30) * sizes, normal(12, seed=1)
    parameters = ParameterVector([nn.Parameter(torch.zeros(12, dtype=F64))])
    preconditioner = kind.make(parameters)
    preconditioner.refresh(evidence(matrix, gradient))
    P = preconditioner.operator(0.1)
    if P is not None:
        dense = P.to_dense()
        torch.testing.assert_close(dense, dense.T)
        assert torch.linalg.eigvalsh(dense)[0] > 0
    result = conjugate_gradient(DenseOperator(matrix), -gradient, damping=0.1, preconditioner=P, stopping=())
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(12, dtype=F64), -gradient)
    torch.testing.assert_close(result.solution, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("kind", "spent"), [(Hutchinson(every=3, probes=4), 4), (Nystrom(rank=7, every=3), 7)])
def test_products_of_a_refresh_are_counted(kind: Preconditioning, spent: int) -> None:
    model = network()
    optimizer = NewtonKrylov(model.parameters(), preconditioning=kind)
    for step in range(7):
        optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
        record = optimizer.last_step
        scale = step == 0  # the product that gives the damping its unit
        extra = spent if step % 3 == 0 else 0
        assert record.products == record.cost.gauss_newton_products == record.iterations + scale + extra
        assert record.cost.refreshes == 0
        assert record.cost.gradient_equivalents == pytest.approx(
            4 / 3 + 4 / 3 * record.products + record.cost.losses / 3 + record.cost.gradients
        )
    assert optimizer.state_dict()["newton_krylov"]["memory"]["products"] == optimizer.last_step.iterations


def test_squared_gradients_cost_nothing() -> None:
    model = network()
    optimizer = NewtonKrylov(model.parameters(), preconditioning=SquaredGradients())
    for step in range(3):
        optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
        assert optimizer.last_step.products == optimizer.last_step.iterations + (step == 0)


def test_formulas_of_the_diagonals() -> None:
    parameters = ParameterVector([nn.Parameter(torch.zeros(3, dtype=F64))])
    d, g, h = (torch.tensor(v, dtype=F64) for v in ([4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [3.0, 0.0, 0.0]))
    exact = Hutchinson(power=1.0, floor=0.3, every=1).make(parameters)
    exact.refresh(evidence(torch.diag(d), g))
    assert isinstance(exact.operator(0.5), DiagonalOperator)
    torch.testing.assert_close(exact.operator(0.5).to_dense(), torch.diag(1 / torch.tensor([4.5, 1.5, 1.0]).to(F64)))
    exact.refresh(evidence(torch.diag(3 * d), g))  # the first two count evenly: 2 d
    torch.testing.assert_close(exact.operator(0.0).to_dense(), torch.diag(1 / torch.tensor([8.0, 2.0, 1.0]).to(F64)))
    squares = SquaredGradients(floor=0.5).make(parameters)
    squares.refresh(evidence(torch.eye(3, dtype=F64), g))
    squares.refresh(evidence(torch.eye(3, dtype=F64), h))
    mean = torch.tensor([5.0, 2.0, 0.0], dtype=F64)
    torch.testing.assert_close(squares.operator(0.3).to_dense(), torch.diag(mean.clamp(min=0.5 * 7 / 3) ** -0.5))


@pytest.mark.parametrize("name", FROM_PRODUCTS)
def test_what_is_not_finite_is_left_out(name: str) -> None:
    parameters = ParameterVector([nn.Parameter(torch.zeros(6, dtype=F64))])
    preconditioner = FROM_PRODUCTS[name].make(parameters)
    for _ in range(5):
        preconditioner.refresh(evidence(torch.full((6, 6), math.nan, dtype=F64), normal(6)))
    assert preconditioner.operator(0.1) is None
    for _ in range(5):
        preconditioner.refresh(evidence(torch.eye(6, dtype=F64), normal(6)))
    assert preconditioner.operator(0.1).to_dense().isfinite().all()


@pytest.mark.parametrize("kind", [Hutchinson, Nystrom])
def test_seeds_decide_and_global_random_numbers_do_not(kind: Any) -> None:
    moves = []
    for seed, noise in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(noise)
        model = network()
        optimizer = NewtonKrylov(
            model.parameters(),
            preconditioning=kind(seed=seed, every=1),
            curvature=ExactHessian(),
            forcing=ResidualForcing(),
        )
        before = torch.get_rng_state()
        for _ in range(3):
            optimizer.step(lambda model=model: F.cross_entropy(model(X), LABELS))
        assert torch.equal(torch.get_rng_state(), before)
        moves.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(moves[0], moves[1])
    assert not torch.equal(moves[0], moves[2])


def test_nystrom_shortens_solves_of_a_falling_spectrum() -> None:
    """A quadratic with condition number 1e6, most of it in ten directions."""
    scales = torch.cat([torch.logspace(3, 0, 10), torch.linspace(0.5, 1.0, 190)]).to(F64)
    products = {}
    for name, kind in (("none", NoPreconditioning()), ("nystrom", Nystrom(rank=20, every=100))):
        w = nn.Parameter(torch.ones(200, dtype=F64))
        optimizer = NewtonKrylov([w], preconditioning=kind, forcing=ResidualForcing(eta=1e-4))
        while optimizer.last_step is None or optimizer.last_step.gradient_norm > 1e-8:
            optimizer.step(lambda w=w: ((scales * w) ** 2).sum())
        products[name] = optimizer.cost.products
    assert products["nystrom"] < products["none"] / 2


def test_states_of_others_are_refused(kind: Preconditioning) -> None:
    parameters = ParameterVector([nn.Parameter(torch.zeros(3, dtype=F64))])
    state = kind.make(parameters).state_dict()
    for other in KINDS.values():
        same = type(other) is type(kind) and type(getattr(other, "base", None)) is type(getattr(kind, "base", None))
        if same:
            other.make(parameters).load_state_dict(state)
        elif state or not isinstance(other, NoPreconditioning):
            with pytest.raises(ValueError, match="another preconditioning"):
                other.make(parameters).load_state_dict(state)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Hutchinson(every=0),
        lambda: Hutchinson(probes=0),
        lambda: Hutchinson(decay=1.0),
        lambda: Hutchinson(power=0.0),
        lambda: SquaredGradients(floor=0.0),
        lambda: SquaredGradients(decay=-0.1),
        lambda: Nystrom(rank=0),
        lambda: Nystrom(every=0),
        lambda: Nystrom(rank=5, largest=4),
    ],
)
def test_options_out_of_range_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        build()


class Indefinite(Preconditioning):
    def make(self, parameters: ParameterVector) -> Preconditioner:
        class Negated(Preconditioner):
            def refresh(self, evidence: Evidence) -> Cost:
                return Cost()

            def operator(self, damping: float) -> LinearOperator:
                return DiagonalOperator(-torch.ones(parameters.size, dtype=parameters.dtype))

        return Negated()


@pytest.mark.parametrize("solver", [ConjugateGradient(), MinimalResidual(), SteihaugToint(), GeneralizedLanczos()])
def test_without_the_preconditioner_where_it_is_not_positive_definite(solver: Solver) -> None:
    steps = []
    for preconditioning in (Indefinite(), NoPreconditioning()):
        model = network(0)
        optimizer = NewtonKrylov(model.parameters(), preconditioning=preconditioning, solver=solver)
        steps.append([float(optimizer.step(lambda m=model: F.cross_entropy(m(X), LABELS))) for _ in range(3)])
    assert steps[0] == steps[1]


@pytest.mark.parametrize("every", [1, 2, 10])
def test_young_factors_are_refreshed_more_often(every: int) -> None:
    preconditioner = Kronecker(every=every).make(ParameterVector(network()))
    due = [step for step in range(300) if preconditioner.observer() is not None]
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert due[0] == 0
    assert gaps[0] == min(every, 2)
    assert gaps == sorted(gaps)
    assert gaps[-5:] == [every] * 5


def test_an_automatic_rate_is_half_of_the_inverse_preconditioned_curvature() -> None:
    """λ_max by eigenvalues of the matrices; two steps, of which the second keeps rate and λ."""
    root = normal(8, 8, seed=3)
    A, b = root @ root.T + torch.eye(8, dtype=F64), normal(8, seed=4)
    w = nn.Parameter(torch.zeros(8, dtype=F64))
    damping = LevenbergMarquardt(initial=0.1, floor=0.1, ceiling=0.1)
    rated = AutomaticRate(Nystrom(rank=3, every=5), every=5, iterations=60)
    optimizer = NewtonKrylov(
        [w], curvature=ExactHessian(), solver=PreconditionedGradient(products=False), preconditioning=rated,
        damping=damping, step=FixedStep(),
    )  # fmt: skip
    P = None
    for _ in range(2):
        at = w.detach().clone()
        optimizer.step(lambda: w @ A @ w / 2 - b @ w)
        if P is None:
            approximation = nystrom(DenseOperator(A), 3, generator=torch.Generator().manual_seed(0))
            P = approximation.preconditioner(optimizer.last_step.damping).to_dense()
            largest = torch.linalg.eigvals(P @ A).real.max()
        torch.testing.assert_close(w.detach() - at, -P @ (A @ at - b) / (2 * largest), rtol=1e-6, atol=1e-9)
    assert optimizer.cost.hessian_products == 1 + 3 + 60


def test_an_automatic_rate_alone_is_that_of_gradient_descent() -> None:
    """Without a preconditioner η = share / λ_max; where there is no curvature the first step has length 1."""
    A = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=F64))
    for matrix, expected in ((A, 1 / 18), (0 * A, 1 / math.sqrt(3))):
        w = nn.Parameter(torch.zeros(3, dtype=F64))
        options = {"solver": PreconditionedGradient(products=False), "damping": NoDamping(), "step": FixedStep()}
        rated = AutomaticRate(NoPreconditioning(), iterations=100)
        optimizer = NewtonKrylov([w], curvature=ExactHessian(), preconditioning=rated, **options)
        optimizer.step(lambda: w @ matrix @ w / 2 - w.sum() + 0 * w.square().sum())  # noqa: B023
        torch.testing.assert_close(w.detach(), torch.full((3,), expected, dtype=F64))
