"""Where the optimizer must arrive, and how fast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import F64, fitted_order, normal, rosenbrock
from torch import Tensor, nn

from imstep.globalization import Armijo, FixedStep, NoDamping
from imstep.linalg import KrylovStatus, LinearOperator
from imstep.optim import ExactHessian, Kronecker, NewtonKrylov, NoPreconditioning, ResidualForcing, StepOutcome
from imstep.optim.direction import escape_direction
from imstep.optim.solving import ConjugateGradient, NewtonSystem

# --- speed near a solution ----------------------------------------------------------------------------------------


def logistic(seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Linear(20, 1).to(F64)
    x, y = normal(300, 20, seed=seed), (normal(300, 1, seed=seed + 50) > 0).double()
    decay = lambda: 1e-3 * sum((p**2).sum() for p in model.parameters())
    return model, lambda: F.binary_cross_entropy_with_logits(model(x), y) + decay()


def softmax_regression(seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Linear(10, 5).to(F64)
    x = normal(400, 10, seed=seed) * torch.logspace(-1, 1, 10, dtype=F64)
    y = (x @ normal(10, 5, seed=seed + 1) + normal(400, 5, seed=seed + 2)).argmax(1)
    return model, lambda: F.cross_entropy(model(x), y) + 1e-3 * (model.weight**2).sum() + 1e-3 * (model.bias**2).sum()


def exponentials(seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """No convex end, no layer: the Hessian, unpreconditioned."""
    model = nn.ParameterList([nn.Parameter(normal(30, seed=seed))])
    a = normal(60, 30, seed=seed + 1) / 5
    return model, lambda: torch.logsumexp(a @ model[0], 0) + 0.05 * (model[0] ** 2).sum() ** 1.5


def quartic(seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.ParameterList([nn.Parameter(normal(40, seed=seed))])
    scale = torch.logspace(-1, 1, 40, dtype=F64)
    return model, lambda: (0.5 * scale * model[0] ** 2 + 0.25 * (model[0] - 1) ** 4).sum()


CONVEX = {"logistic": logistic, "softmax": softmax_regression, "exponentials": exponentials, "quartic": quartic}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONVEX)
def test_superlinear_on_strongly_convex_problems(name: str, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, closure = CONVEX[name](seed)
    optimizer = NewtonKrylov(model.parameters())
    norms = []
    for _ in range(60):
        optimizer.step(closure)
        norms.append(optimizer.last_step.gradient_norm)
        if norms[-1] < 1e-12:
            break
    assert norms[-1] < 1e-10 * norms[0]
    assert fitted_order(norms) >= 1.4


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_ill_conditioned_problems(condition: float, seed: int) -> None:
    """Truncated iterations leave gradients that grow and fall; the effort must grow all the same."""
    w = nn.Parameter(normal(50, seed=seed))
    scale = torch.logspace(0, math.log10(condition), 50, dtype=F64)
    turn, _ = torch.linalg.qr(normal(50, 50, seed=seed + 7))
    optimizer = NewtonKrylov([w])
    for _ in range(40):
        optimizer.step(lambda: 0.5 * (scale * (turn @ w) ** 2).sum() + 0.1 * (turn @ w - 0.3).exp().sum())
        if optimizer.last_step.gradient_norm < 1e-13 * condition:
            return
    raise AssertionError(f"‖g‖ = {optimizer.last_step.gradient_norm}")


def test_quadratic_in_few_steps() -> None:
    w = nn.Parameter(normal(20))
    scale = torch.logspace(-1, 1, 20, dtype=F64)
    optimizer = NewtonKrylov([w])
    for _ in range(15):
        optimizer.step(lambda: (scale * (w - 1) ** 2).sum())
    torch.testing.assert_close(w.detach(), torch.ones(20, dtype=F64), rtol=1e-10, atol=1e-10)


def test_single_precision_ends_at_rounding_level() -> None:
    model, _ = logistic(0)
    model = model.float()
    x, y = normal(300, 20).float(), (normal(300, 1, seed=50) > 0).float()
    optimizer = NewtonKrylov(model.parameters())
    for _ in range(30):
        optimizer.step(lambda: F.binary_cross_entropy_with_logits(model(x), y) + 1e-3 * (model.weight**2).sum())
    assert optimizer.last_step.gradient_norm < 1e-6


# --- hard functions -----------------------------------------------------------------------------------------------


def minimise(f: Callable[[], Tensor], params: list[nn.Parameter], steps: int, **options: Any) -> list[float]:
    """Losses until the optimizer says it has converged; they never increase beyond rounding."""
    optimizer = NewtonKrylov(params, **options)
    losses = []
    for _ in range(steps):
        losses.append(float(optimizer.step(f)))
        if optimizer.last_step.outcome is StepOutcome.CONVERGED:
            break
    assert all(b <= a + 1e-14 * abs(a) for a, b in itertools.pairwise(losses))
    return losses


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("seed", range(3))
def test_rosenbrock(n: int, seed: int) -> None:
    w = nn.Parameter(2 * normal(n, seed=seed))
    minimise(lambda: rosenbrock(w), [w], 300)
    _is_minimum(w, rosenbrock)


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": ExactHessian()},
        {"curvature": ExactHessian(), "damping": NoDamping(), "preconditioning": NoPreconditioning()},
        {"step": Armijo(), "curvature": ExactHessian()},
        {"forcing": ResidualForcing()},
    ],
)
def test_rosenbrock_by_other_strategies(options: dict[str, Any]) -> None:
    w = nn.Parameter(2 * normal(6, seed=3))
    minimise(lambda: rosenbrock(w), [w], 400, **options)
    _is_minimum(w, rosenbrock)


def _is_minimum(w: Tensor, f: Callable[[Tensor], Tensor], gradient: float = 1e-8) -> None:
    x = w.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x)
    assert g.norm() < gradient
    curvature = torch.autograd.functional.hessian(f, w.detach())
    assert torch.linalg.eigvalsh(curvature).min() > -1e-6


SADDLES: dict[str, Callable[[Tensor], Tensor]] = {
    "monkey": lambda w: w[0] ** 3 - 3 * w[0] * w[1] ** 2 + (w**2).sum() ** 2,
    "double wells": lambda w: ((w**2 - 1) ** 2).sum(),
    "well and bowl": lambda w: (w[0] ** 2 - 1) ** 2 + (w[1:] ** 2).sum(),
    "product": lambda w: (w[0] * w[1] - 1) ** 2 + 0.1 * (w**4).sum(),
    "cosines": lambda w: w.cos().sum() + 0.05 * (w**2).sum(),
}


@pytest.mark.parametrize("name", [n for n in SADDLES if n != "monkey"])
@pytest.mark.parametrize("n", [2, 7])
def test_exact_saddle(name: str, n: int) -> None:
    """The gradient vanishes at the start, and only the curvature shows the way."""
    w = nn.Parameter(torch.zeros(n, dtype=F64))
    losses = minimise(lambda: SADDLES[name](w), [w], 200)
    assert losses[-1] < losses[0]
    _is_minimum(w, SADDLES[name])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SADDLES)
def test_near_a_saddle(name: str, seed: int) -> None:
    w = nn.Parameter(1e-6 * normal(4, seed=seed))
    minimise(lambda: SADDLES[name](w), [w], 300)
    _is_minimum(w, SADDLES[name])


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_from_anywhere(seed: int, n: int) -> None:
    w = nn.Parameter(3 * normal(n, seed=seed))
    f = lambda w: (w.cos() + 0.1 * w**2).sum() + 0.5 * (w.sum() / 2).sin()
    minimise(lambda: f(w), [w], 300)
    _is_minimum(w, f)


def test_a_network_whose_weights_are_all_zero() -> None:
    """A stationary point of every loss of a deep network, and a saddle."""
    x = normal(30, 2)
    y = (x[:, :1] * x[:, 1:]).sign()
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = NewtonKrylov(model.parameters())
    closure = lambda: F.mse_loss(model(x), y)
    start = float(closure().detach())
    for _ in range(80):
        optimizer.step(closure)
    assert float(closure().detach()) < 0.5 * start


# --- directions of negative curvature --------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A quadratic with known eigenvectors."""

    values: Tensor
    vectors: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.vectors @ torch.diag(self.values) @ self.vectors.T


def planted(lowest: float, n: int = 12) -> Planted:
    vectors, _ = torch.linalg.qr(normal(n, n, seed=4))
    values = torch.linspace(1, 3, n, dtype=F64)
    values[0] = lowest
    return Planted(values, vectors)


@pytest.mark.parametrize("lowest", [-3.0, -0.1, -1e-3])
def test_planted_negative_curvature_is_reported(lowest: float) -> None:
    problem = planted(lowest)
    b = normal(12, seed=1)
    w = nn.Parameter(torch.zeros(12, dtype=F64))
    optimizer = NewtonKrylov([w], curvature=ExactHessian(), damping=NoDamping(), forcing=ResidualForcing(eta=1e-12))
    optimizer.step(lambda: w @ problem.matrix @ w / 2 + b @ w + (w**4).sum() / 1000)
    assert optimizer.last_step.status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
    assert optimizer.last_step.accepted


def test_first_direction_of_negative_curvature_is_followed() -> None:
    problem = planted(-2.0)
    lowest = problem.vectors[:, 0]
    w = nn.Parameter(torch.zeros(12, dtype=F64))
    optimizer = NewtonKrylov([w], curvature=ExactHessian(), damping=NoDamping())
    optimizer.step(lambda: w @ problem.matrix @ w / 2 + lowest @ w + (w**4).sum())
    record = optimizer.last_step
    assert (record.status, record.iterations) == (KrylovStatus.DISTURBING_NEGATIVE_CURVATURE, 0)
    assert record.curvature / record.direction_norm**2 == pytest.approx(-2)
    assert abs(float(w.detach() @ lowest)) == pytest.approx(float(w.detach().norm()))


def test_escape_from_an_exact_saddle_follows_the_planted_vector() -> None:
    problem = planted(-2.0)
    w = nn.Parameter(torch.zeros(12, dtype=F64))
    optimizer = NewtonKrylov([w])
    optimizer.step(lambda: w @ problem.matrix @ w / 2 + (w**4).sum())
    record = optimizer.last_step
    assert record.accepted
    assert record.status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
    assert record.curvature == pytest.approx(-2)
    assert abs(float(w.detach() @ problem.vectors[:, 0])) == pytest.approx(float(w.detach().norm()))


class Dense(LinearOperator):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


def test_no_escape_from_a_minimum() -> None:
    zero = torch.zeros(12, dtype=F64)
    assert escape_direction(Dense(planted(1e-3).matrix), zero, seed=0) is None
    assert escape_direction(Dense(0 * planted(1.0).matrix), zero, seed=0) is None


def test_escape_points_downhill() -> None:
    problem = planted(-1.0)
    for sign in (-1, 1):
        gradient = 1e-13 * sign * problem.vectors[:, 0]
        escape = escape_direction(Dense(problem.matrix), gradient, seed=0)
        assert escape is not None
        direction = escape.direction
        assert direction.slope < 0
        assert float(gradient @ direction.vector) == pytest.approx(direction.slope)


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_products_that_are_not_finite_fall_back_to_the_gradient(fill: float) -> None:
    gradient = normal(4)
    operator = Dense(torch.full((4, 4), fill, dtype=F64))
    system = NewtonSystem(operator, gradient, 0.0, None, 0, (), math.inf, None, None, None)
    direction = ConjugateGradient().solve(system)
    assert torch.equal(direction.vector, -gradient)
    assert direction.curvature == 0
    assert direction.status is KrylovStatus.NON_FINITE


# --- the Taylor error ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("preconditioning", [NoPreconditioning(), Kronecker()])
def test_taylor_error_is_third_order_in_the_step_length(seed: int, preconditioning: Any) -> None:
    x, labels = normal(30, 4, seed=seed), torch.arange(30) % 3
    lengths, errors = [0.4, 0.2, 0.1, 0.05, 0.025], []
    for step_length in lengths:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
        optimizer = NewtonKrylov(
            model.parameters(),
            curvature=ExactHessian(),
            step=FixedStep(step_length),
            preconditioning=preconditioning,
        )
        optimizer.step(lambda model=model: F.cross_entropy(model(x), labels))
        record = optimizer.last_step
        assert record.step_length == step_length
        assert record.predicted_decrease == pytest.approx(
            -step_length * record.slope - step_length**2 * record.curvature / 2, rel=1e-12
        )
        errors.append(abs(record.taylor_error))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(3, abs=0.15)
