"""What the solvers of a step do with what they are given."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal
from torch import Tensor, nn

from benchmarks.termination.unguarded import unguarded_solve
from imstep.curvature import GaussNewton, Hessian
from imstep.globalization import FixedStep, NoDamping
from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    NoiseTest,
    ProductBudget,
    RelativeResidual,
    conjugate_gradient,
)
from imstep.optim import (
    BlockDiagonal,
    ConjugateGradient,
    Direct,
    ExactHessian,
    GeneralizedLanczos,
    IterateBacktracking,
    NewtonKrylov,
    NewtonSystem,
    NoPreconditioning,
    PreconditionedGradient,
    ResidualForcing,
    SteihaugToint,
)
from imstep.optim.direction import combined, descent
from imstep.optim.forcing import Forcing


class OneProduct(Forcing):
    def rules(self, situation):
        return (ProductBudget(1),)


def system(matrix: Tensor, gradient: Tensor, **options) -> NewtonSystem:
    given = {"damping": 0.0, "preconditioner": None, "keep_pairs": 0, "stopping": (), "radius": math.inf}
    given |= {"last_move": None, "point": None, "parameters": None}
    return NewtonSystem(DenseOperator(matrix), gradient, **{**given, **options})


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    return q @ values.diag() @ q.T


@pytest.mark.parametrize("seed", range(4))
def test_following_negative_curvature_goes_further_down_the_model(seed: int) -> None:
    matrix = symmetric(torch.cat([torch.tensor([-1.0, -0.1]), torch.logspace(-1, 1, 8)]).to(F64), seed)
    gradient = normal(10, seed=seed + 10)
    plain = ConjugateGradient().solve(system(matrix, gradient))
    followed = ConjugateGradient(follow=True).solve(system(matrix, gradient))
    model = lambda d: float(gradient @ d.vector + d.vector @ matrix @ d.vector / 2)
    assert followed.status is plain.status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
    assert plain.iterations > 0
    assert model(followed) < model(plain) < 0
    torch.testing.assert_close(followed.image, matrix @ followed.vector)
    assert followed.norm <= 2 * plain.norm * (1 + 1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("curvature", [2.0, -2.0])
def test_a_preconditioned_gradient_is_as_long_as_the_size_of_curvature_says(curvature: float, damping: float) -> None:
    """τ = -gᵀd / (|dᵀAd| + λ‖d‖²), whatever the units of the loss and of the preconditioner."""
    gradient, scale = normal(6), normal(6, seed=1).abs() + 0.1
    matrix = curvature * torch.eye(6, dtype=F64)
    d = -scale * gradient
    expected = -(gradient @ d) / ((2.0 + damping) * (d @ d)) * d
    for loss, metric in itertools.product((1.0, 1e-12, 1e9), (1.0, 1e-8, 1e12)):
        P = DiagonalOperator(metric * scale)
        given = system(loss * matrix, loss * gradient, damping=loss * damping, preconditioner=P)
        torch.testing.assert_close(PreconditionedGradient().solve(given).vector, expected, rtol=1e-9, atol=0.0)


def test_noise_ends_the_iteration_of_a_step() -> None:
    x = normal(40, 4)
    y = x[:, :1] * torch.where(torch.arange(40) % 2 == 0, 30.0, 0.1)[:, None]  # the halves disagree along x₁
    statuses = {}
    for z in (0.1, 1e6):
        net = nn.Linear(4, 1).to(F64)
        scaled = lambda net=net: F.mse_loss(net(x) * torch.where(torch.arange(40) % 2 == 0, 3.0, 0.3)[:, None], y)
        optimizer = NewtonKrylov(net.parameters(), solver=ConjugateGradient(noise=NoiseTest(z)))
        optimizer.step(scaled)
        statuses[z] = optimizer.last_step.status
        assert optimizer.last_step.accepted
    assert statuses[0.1] is not KrylovStatus.DISTURBING_NOISE
    assert statuses[1e6] is KrylovStatus.DISTURBING_NOISE


def test_noise_test_refuses_a_loss_without_examples() -> None:
    w = nn.Parameter(torch.ones(3, dtype=F64))
    optimizer = NewtonKrylov([w], solver=ConjugateGradient(noise=NoiseTest()))
    with pytest.raises(ValueError, match="noise test"):
        optimizer.step(lambda: w.prod().exp())
    assert torch.equal(w, torch.ones(3, dtype=F64))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_momentum_minimises_the_model_over_two_directions(damping: float) -> None:
    matrix, gradient, last = symmetric(torch.logspace(-1, 1, 10).to(F64)), normal(10, seed=1), normal(10, seed=2)
    d = ConjugateGradient().solve(system(matrix, gradient, damping=damping, stopping=(ProductBudget(2),)))
    best = combined(gradient, d, last, matrix @ last, damping)
    basis = torch.stack([d.vector, last], dim=1)
    damped = matrix + damping * torch.eye(10, dtype=F64)
    expected = basis @ torch.linalg.solve(basis.T @ damped @ basis, -basis.T @ gradient)
    torch.testing.assert_close(best.vector, expected)
    torch.testing.assert_close(best.image, matrix @ expected)
    assert best.curvature == pytest.approx(float(expected @ matrix @ expected))
    parallel = combined(gradient, d, 2 * d.vector, 2 * d.image, damping)
    assert parallel is d


def test_a_solution_that_does_not_descend_gives_way_to_the_gradient() -> None:
    matrix, gradient = symmetric(torch.logspace(-1, 1, 10).to(F64)), normal(10, seed=1)
    result = conjugate_gradient(DenseOperator(matrix), gradient)  # of the wrong sign
    direction = descent(DenseOperator(matrix), gradient, result)
    bend = float(gradient @ matrix @ gradient)
    expected = -(gradient @ gradient) / bend * gradient
    torch.testing.assert_close(direction.vector, expected)
    assert direction.curvature == pytest.approx(float(expected @ matrix @ expected))


def test_momentum_is_conjugate_gradients_on_a_quadratic() -> None:
    """One product for the gradient, one for the last step: the minimiser of n = 5 dimensions after 5 steps."""
    matrix, b = symmetric(torch.logspace(0, 2, 5).to(F64)), normal(5, seed=3)
    w = nn.Parameter(torch.zeros(5, dtype=F64))
    optimizer = NewtonKrylov(
        [w],
        curvature=ExactHessian(),
        solver=ConjugateGradient(),
        forcing=OneProduct(),
        step=FixedStep(1.0),
        damping=NoDamping(),
        preconditioning=NoPreconditioning(),
        momentum=True,
    )
    for _ in range(5):
        optimizer.step(lambda: w @ matrix @ w / 2 - b @ w)
    torch.testing.assert_close(w.detach(), torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-10)
    assert optimizer.cost.products == 5 + 4 + 1  # and one for the scale of the curvature


@pytest.mark.parametrize("solver", [SteihaugToint(), GeneralizedLanczos(), Direct()])
def test_trust_region_solvers_stay_within_the_radius(solver) -> None:
    matrix, gradient = symmetric(torch.linspace(-1, 3, 8).to(F64)), normal(8)
    direction = solver.solve(system(matrix, gradient, radius=0.25))
    assert direction.norm == pytest.approx(0.25)
    assert direction.slope < 0
    assert direction.curvature == pytest.approx(float(direction.vector @ matrix @ direction.vector))


@pytest.mark.parametrize("curvature", [None, ExactHessian()])
def test_a_block_diagonal_solve_is_that_of_each_parameter_by_itself(curvature) -> None:
    net, before = network(), network()
    parameters = list(net.parameters())
    closure = lambda: F.cross_entropy(net(X), LABELS) + sum(p.square().sum() for p in parameters) / 2
    hessian = Hessian(closure, parameters)
    gradient, matrix = hessian.gradient, hessian.to_dense()
    if curvature is None:
        matrix = GaussNewton(lambda: (net(X), LABELS), parameters, F.cross_entropy).to_dense()
        matrix = matrix + torch.eye(len(matrix), dtype=F64)
    optimizer = NewtonKrylov(
        parameters,
        curvature=curvature,
        solver=BlockDiagonal(),
        forcing=ResidualForcing(1e-12),
        step=FixedStep(1.0),
        damping=NoDamping(),
        preconditioning=NoPreconditioning(),
    )
    optimizer.step(closure)
    entries = torch.arange(len(matrix)).split([p.numel() for p in parameters])
    wanted = torch.cat([torch.linalg.solve(matrix[at][:, at], -gradient[at]) for at in entries])
    move = torch.cat([(p - q).detach().flatten() for p, q in zip(parameters, before.parameters(), strict=True)])
    torch.testing.assert_close(move, wanted, rtol=1e-8, atol=1e-10)
    step = optimizer.last_step
    assert step.curvature == pytest.approx(float(wanted @ matrix @ wanted))
    products = step.cost.hessian_products if curvature else step.cost.gauss_newton_products
    assert products >= len(parameters) * step.iterations > 0


def test_blocks_belong_to_parameters() -> None:
    with pytest.raises(TypeError, match="solver of NewtonKrylov"):
        BlockDiagonal().solve(system(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64)))


@pytest.mark.parametrize("options", [{"momentum": True}, {"solver": ConjugateGradient(warm_start=0.9)}])
def test_the_last_move_survives_saving(options) -> None:
    losses = []
    for interrupted in (False, True):
        net = network()
        optimizer = NewtonKrylov(net.parameters(), **options)
        closure = lambda net=net: F.cross_entropy(net(X), LABELS)
        for step in range(6):
            if interrupted and step == 3:
                state = optimizer.state_dict()
                optimizer = NewtonKrylov(net.parameters(), **options)
                optimizer.load_state_dict(state)
            optimizer.step(closure)
        losses.append(float(closure().detach()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("lowest", [0.1, -1.0])
def test_what_the_ablation_compares_with_solves_any_system(lowest: float) -> None:
    matrix = symmetric(torch.cat([torch.tensor([lowest]), torch.logspace(-1, 1, 9)]).to(F64))
    gradient, damped = normal(10), matrix + 0.01 * torch.eye(10, dtype=F64)
    rules = (RelativeResidual(1e-10), ProductBudget(30))
    found = unguarded_solve(system(matrix, gradient, damping=0.01, stopping=rules))
    exact = torch.linalg.solve(damped, -gradient)
    torch.testing.assert_close(found.solution, exact, rtol=1e-7, atol=1e-8)
    assert math.isclose(found.damped_decrease, float(exact @ damped @ exact) / 2, rel_tol=1e-7)


def textbook_iterates(A: Tensor, b: Tensor) -> list[Tensor]:
    """Nocedal and Wright, Algorithm 5.2, from zero."""
    x, r = torch.zeros_like(b), b.clone()
    p, found = r.clone(), []
    for _ in range(len(b)):
        a = (r @ r) / (p @ A @ p)
        x, new = x + a * p, r - a * A @ p
        found.append(x)
        p, r = new + (new @ new) / (r @ r) * p, new
    return found


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_the_best_of_the_stored_iterates_by_the_loss_is_taken(lr: float) -> None:
    """A loss whose quadratic model holds near the start only: later iterates go too far."""
    A = symmetric(torch.logspace(-3, 1, 12, dtype=F64), seed=3)
    b = normal(12, seed=4)
    loss = lambda w: w @ A @ w / 2 - b @ w + 1e-6 * (w @ w) ** 2
    iterates = textbook_iterates(A, b)
    losses = [float(loss(x)) for x in iterates]
    stored = [*sorted({math.ceil(1.3**j) for j in range(12)} & set(range(12))), 12]
    best = len(stored) - 1
    while best > 0 and losses[stored[best - 1] - 1] < losses[stored[best] - 1]:
        best -= 1
    assert 0 < best < len(stored) - 1
    w = nn.Parameter(torch.zeros(12, dtype=F64))
    solver = ConjugateGradient(backtracking=IterateBacktracking())
    plain = {"damping": NoDamping(), "preconditioning": NoPreconditioning(), "step": FixedStep()}
    optimizer = NewtonKrylov([w], lr=lr, curvature=ExactHessian(), solver=solver, forcing=Exactly(), **plain)
    optimizer.step(lambda: loss(w))
    torch.testing.assert_close(w.detach(), lr * iterates[stored[best] - 1], rtol=1e-6, atol=1e-8)
    assert optimizer.cost.losses == 1 + len(stored) - best + 1 + (1 + (lr < 1))  # the start, twice


class Exactly(Forcing):
    def rules(self, situation):
        return RelativeResidual(1e-12), ProductBudget(12)


def test_backtracking_over_iterates_passes_those_that_are_not_finite() -> None:
    A = symmetric(torch.logspace(-2, 1, 8, dtype=F64), seed=3)
    b = normal(8, seed=4)
    iterates = textbook_iterates(A, b)
    reach = 1.001 * float(iterates[3].norm())
    w = nn.Parameter(torch.zeros(8, dtype=F64))
    loss = lambda: w @ A @ w / 2 - b @ w + torch.where(w.detach().norm() > reach, torch.nan, 0.0)
    solver = ConjugateGradient(backtracking=IterateBacktracking())
    plain = {"damping": NoDamping(), "preconditioning": NoPreconditioning(), "step": FixedStep()}
    NewtonKrylov([w], curvature=ExactHessian(), solver=solver, forcing=Exactly(), **plain).step(loss)
    torch.testing.assert_close(w.detach(), iterates[3], rtol=1e-6, atol=1e-8)  # the largest stored within reach
