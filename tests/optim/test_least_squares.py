"""Levenberg-Marquardt in residual space, against dense algebra and on problems with known solutions."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import imstep
from imstep.curvature.squares import NoResidualsError
from imstep.globalization import ContractionDamping
from imstep.linalg import (
    ByShape,
    DenseFactorisation,
    Factorisation,
    NormalEquations,
    PivotedCholesky,
    PivotedQR,
    RandomizedNystrom,
    SketchedFactorisation,
    ThinFactorisation,
    ThinLeastSquares,
)
from imstep.optim import (
    Box,
    ColumnNorms,
    EarlierDraws,
    EqualTraces,
    LeastSquares,
    NonFiniteLossError,
    StepOutcome,
    Unscaled,
)
from imstep.optim.chord import chord_iterations, decrease_of
from imstep.optim.scaling import Scaling

X, Y = normal(12, 3), normal(12, 1, seed=1)


def network(seed: int = 0, width: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).to(F64)


def fit(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.mse_loss(model(X), Y)


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def residuals_at(model: nn.Module, w: Tensor) -> Tensor:
    """ρ with f = ρᵀρ/2."""
    sizes = [p.numel() for p in model.parameters()]
    named = zip(dict(model.named_parameters()), model.parameters(), w.split(sizes), strict=True)
    values = {name: part.view(p.shape) for name, p, part in named}
    return (2 / len(X)) ** 0.5 * (torch.func.functional_call(model, values, (X,)) - Y)[:, 0]


def anderson(correct: Callable[[Tensor], Tensor], start: Tensor, count: int) -> Tensor:
    """Where ``count`` iterations d <- Σ α_j (d_j + c_j) lead: Σ α_j = 1, ‖Σ α_j c_j‖ least; by Lagrange."""
    points, corrections = [start], [correct(start)]
    for at in range(1, count + 1):
        C = torch.stack(corrections, 1)
        system, right = torch.zeros(at + 1, at + 1, dtype=F64), torch.zeros(at + 1, dtype=F64)
        system[:at, :at], system[:at, at], system[at, :at], right[at] = C.T @ C, 1, 1, 1
        points.append((torch.stack(points, 1) + C) @ torch.linalg.solve(system, right)[:at])
        corrections.append(correct(points[-1]))
    return points[-1]


def dense_corrections(model: nn.Module, damping: float, count: int) -> Tensor:
    """Where ``count`` accelerated chord iterations lead, by the normal equations of the whole Jacobian."""
    w = flat(model)
    J = torch.func.jacrev(lambda v: residuals_at(model, v))(w)
    normal_matrix = J.T @ J + damping * torch.eye(len(w), dtype=F64)
    correct = lambda d: -torch.linalg.solve(normal_matrix, J.T @ residuals_at(model, w + d) + damping * d)
    return w + anderson(correct, torch.zeros_like(w), count)


WAYS = [
    (ThinFactorisation(), "singular values"),
    (ThinFactorisation(values=0), "triangular"),
    (NormalEquations(), "normal"),
    (PivotedQR(most=16), "rows"),
    (SketchedFactorisation(columns=1), "sketch"),
    (ByShape(narrow=0), "normal"),
    (ByShape(narrow=0, memory=0), "columns"),
]


@pytest.mark.parametrize(("factorisation", "kind"), WAYS, ids=str)
@pytest.mark.parametrize("scaling", [Unscaled(), ColumnNorms()], ids=str)
def test_every_way_takes_the_same_steps(factorisation: Factorisation, kind: str, scaling: Scaling) -> None:
    """With more residuals than parameters; λ from the same rule."""
    inputs, targets = normal(60, 3), normal(60, 1, seed=1)
    ends = []
    for way in (ThinFactorisation(), factorisation):
        model = network(width=3)
        optimizer = LeastSquares(model.parameters(), factorisation=way, scaling=scaling, share=1e-9)
        for _ in range(1 if kind == "sketch" else 4):
            optimizer.step(lambda model=model: F.mse_loss(model(inputs), targets))
        ends.append(flat(model))
    assert optimizer.last_step.factorisation == kind
    assert 1 <= optimizer.last_step.rank <= 16
    moved = (ends[0] - flat(network(width=3))).norm()
    assert (ends[0] - ends[1]).norm() < (5e-2 if kind == "sketch" else 1e-6) * moved


AMONG_RESIDUALS = [PivotedCholesky(), RandomizedNystrom(), DenseFactorisation(), PivotedQR(most=100)]


@pytest.mark.parametrize("factorisation", AMONG_RESIDUALS, ids=str)
@pytest.mark.parametrize("corrections", [1, 2, 3])
def test_step_is_that_of_dense_algebra(corrections: int, factorisation: Factorisation) -> None:
    model = network()
    optimizer = LeastSquares(
        model.parameters(),
        factorisation=factorisation,
        corrections=corrections,
        share=0.0,
        damping=ContractionDamping(initial=1.0),
    )
    twin = copy.deepcopy(model)
    optimizer.step(fit(model))
    record = optimizer.last_step
    assert record is not None
    assert record.iterations == corrections
    expected = dense_corrections(twin, record.damping, corrections)
    torch.testing.assert_close(flat(model), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bend", [-0.5, -1.0])
def test_a_step_that_comes_to_too_little_is_corrected_further(bend: float) -> None:
    """Beyond two corrections, where these have not lowered the loss by 0.7 of what the first one promised."""
    J, start, bent = normal(9, 4), normal(9, seed=1), normal(9, seed=2)
    reduced = ThinLeastSquares(J)
    there = lambda u: start + J @ reduced.vector(u) + bend * bent * float(u @ u)
    rules = {"limit": 0.95, "max_iterations": 2, "enough": 0.7}
    two, more = (chord_iterations(reduced, start, start, 1e-3, there, most=most, **rules) for most in (2, 12))
    too_little = two.decrease < 0.7 * two.promise
    assert too_little == (bend == -1.0)
    assert two.evaluations == 2
    assert more.evaluations == (12 if too_little else 2)
    assert more.decrease >= two.decrease


@pytest.mark.parametrize("corrections", [1, 2])
def test_momentum_is_that_of_dense_algebra(corrections: int) -> None:
    """After one step: min ‖ρ(w + d)‖² + λ‖d - μ d'‖² with the Jacobian at w, from d = μ d' on."""
    model, options = network(), {"share": 0.0, "damping": ContractionDamping(initial=1.0)}
    optimizer = LeastSquares(model.parameters(), momentum=0.4, corrections=corrections, **options)
    start = flat(model)
    optimizer.step(fit(model))
    w, twin = flat(model), copy.deepcopy(model)
    optimizer.step(fit(model))
    record = optimizer.last_step
    assert record is not None
    J = torch.func.jacrev(lambda v: residuals_at(twin, v))(w)
    shift = 0.4 * (w - start)
    normal_matrix = J.T @ J + record.damping * torch.eye(len(w), dtype=F64)
    gradient = lambda d: J.T @ residuals_at(twin, w + d) + record.damping * (d - shift)
    d = anderson(lambda d: -torch.linalg.solve(normal_matrix, gradient(d)), shift, corrections)
    torch.testing.assert_close(flat(model), w + d, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_record_describes_the_step(momentum: float) -> None:
    model = network()
    optimizer = LeastSquares(model.parameters(), share=0.0, momentum=momentum)
    optimizer.step(fit(model))
    before, start = flat(model), fit(model)().detach()
    J = torch.func.jacrev(lambda v: residuals_at(model, v))(before)
    gradient = J.T @ residuals_at(model, before)
    assert torch.equal(optimizer.step(fit(model)), start)
    record = optimizer.last_step
    assert record is not None
    d = flat(model) - before
    assert record.accepted
    assert record.new_loss == pytest.approx(fit(model)().item(), rel=1e-12)
    assert record.direction_norm == pytest.approx(d.norm().item())
    assert record.gradient_norm == pytest.approx(gradient.norm().item())
    assert record.slope == pytest.approx((gradient @ d).item())
    assert record.curvature == pytest.approx((J @ d).square().sum().item())
    assert record.predicted_decrease == pytest.approx(-record.slope - record.curvature / 2)
    assert record.actual_decrease == pytest.approx(start.item() - record.new_loss)
    assert record.rho == pytest.approx(record.actual_decrease / record.predicted_decrease)
    assert record.taylor_error == pytest.approx(record.predicted_decrease - record.actual_decrease)
    torch.testing.assert_close(nn.utils.parameters_to_vector([p.grad for p in model.parameters()]), gradient)


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_cost_counts_evaluations(momentum: float) -> None:
    model, calls = network(), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return fit(model)()

    optimizer = LeastSquares(model.parameters(), momentum=momentum)
    for _ in range(5):
        optimizer.step(closure)
    cost = optimizer.cost
    assert cost.losses == calls
    assert cost.jacobian_passes == 4 + 4 * 3  # one more to find which row is whose; the last is where a step ends
    assert cost.gradient_equivalents == pytest.approx(calls / 3 + 16 * 2 / 3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [{"share": 0.0}, {}, {"factorisation": RandomizedNystrom(seed=3)}, {"factorisation": DenseFactorisation()}],
    ids=str,
)
def test_interpolates_and_never_rises(seed: int, options: dict[str, Any]) -> None:
    model = network(seed)
    optimizer = LeastSquares(model.parameters(), **options)
    losses = [float(optimizer.step(fit(model))) for _ in range(40)]
    assert losses[-1] < 1e-20
    assert all(b <= a for a, b in pairwise(losses))


def test_solves_a_differential_equation() -> None:
    """u_xx = -π² sin πx with zero ends: two conditions, second input derivatives, fewer residuals than parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).to(F64)
    x = torch.linspace(0, 1, 41, dtype=F64)[:, None].requires_grad_()
    ends = torch.tensor([[0.0], [1.0]], dtype=F64)

    def closure() -> Tensor:
        slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        bend = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
        return (bend + math.pi**2 * (math.pi * x.detach()).sin()).square().mean() + model(ends).square().mean()

    optimizer = LeastSquares(model.parameters())
    for _ in range(40):
        optimizer.step(closure)
    assert closure() < 1e-9
    points = torch.linspace(0, 1, 200, dtype=F64)[:, None]
    assert (model(points) - (math.pi * points).sin()).abs().max() < 1e-4


def test_minimum_that_is_not_zero() -> None:
    """More residuals than parameters: the minimiser of a linear model by the normal equations."""
    model = nn.Linear(3, 1).to(F64)
    optimizer = LeastSquares(model.parameters(), tolerance=1e-9)
    for _ in range(60):
        optimizer.step(fit(model))
    assert optimizer.last_step is not None
    assert optimizer.last_step.outcome is StepOutcome.CONVERGED
    expected = torch.linalg.lstsq(torch.cat([X, torch.ones(12, 1, dtype=F64)], 1), Y).solution[:, 0]
    torch.testing.assert_close(flat(model), expected, rtol=1e-6, atol=1e-8)


def test_single_precision() -> None:
    model = network().float()
    optimizer = LeastSquares(model.parameters())
    for _ in range(15):
        optimizer.step(lambda: F.mse_loss(model(X.float()), Y.float()))
    assert F.mse_loss(model(X.float()), Y.float()) < 1e-10


@pytest.mark.parametrize(
    ("break_at", "options"),
    [(0, {}), (1, {}), (4, {}), (4, {"momentum": 0.3}), (4, {"factorisation": RandomizedNystrom()})],
)
def test_resumes_bit_for_bit(break_at: int, options: dict[str, Any]) -> None:
    whole, part = network(), network()
    first, second = (LeastSquares(net.parameters(), **options) for net in (whole, part))
    for _ in range(break_at):
        second.step(fit(part))
    resumed = LeastSquares(part.parameters(), **options)
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    for step in range(7):
        first.step(fit(whole))
        if step >= break_at:
            resumed.step(fit(part))
    assert torch.equal(flat(whole), flat(part))
    assert first.cost == resumed.cost


def test_many_products_are_told_of_once_and_where_the_step_is_called() -> None:
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1)).to(F64)
    t = torch.linspace(0, 1, 70, dtype=F64)[:, None]
    kernel, optimizer = torch.exp(-((t - t.mT) ** 2)) / 70, LeastSquares(model.parameters())
    closure = lambda: (model(t) - kernel @ model(t) - t.sin()).square().mean()
    with pytest.warns(UserWarning, match="takes 70 products") as told:
        optimizer.step(closure)
    assert [one.filename for one in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)


@pytest.mark.filterwarnings("ignore:.*not recognised")
def test_minimises_a_function_of_a_tensor() -> None:
    A, b = normal(9, 4), normal(9, seed=1)
    start = torch.zeros(4, dtype=F64)
    result = imstep.minimize(lambda x: (A @ x - b).square().sum(), start, method="least-squares")
    assert result.success
    torch.testing.assert_close(result.x, torch.linalg.lstsq(A, b).solution, rtol=1e-7, atol=1e-8)
    with pytest.raises(ValueError, match="'newton-krylov', 'least-squares'"):
        imstep.minimize(lambda x: x.square().sum(), start, method="lm")


def test_state_of_another_optimizer_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="not saved by LeastSquares"):
        LeastSquares(model.parameters()).load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())


def test_closure_that_calls_backward() -> None:
    plain, other = network(), network()
    first, second = LeastSquares(plain.parameters()), LeastSquares(other.parameters())

    def closure() -> Tensor:
        second.zero_grad()
        loss = fit(other)()
        loss.backward()
        return loss

    for _ in range(3):
        first.step(fit(plain))
        second.step(closure)
    assert torch.equal(flat(plain), flat(other))


def test_dropout_is_the_same_throughout_a_step() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(network(width=40)[0], nn.Tanh(), nn.Dropout(0.3), nn.Linear(40, 1).to(F64))
        optimizer = LeastSquares(model.parameters(), damping=ContractionDamping(initial=10.0))
        state = torch.get_rng_state()
        optimizer.step(fit(model))
        torch.set_rng_state(state)
        after = fit(model)().item()
    assert optimizer.last_step is not None
    assert optimizer.last_step.new_loss == pytest.approx(after, rel=1e-12)


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = LeastSquares(model.parameters())
    start = float(optimizer.step(fit(model)))
    assert torch.equal(model[0].weight, before)
    assert fit(model)() < start


def test_parameters_that_are_frozen_later() -> None:
    model = network()
    optimizer = LeastSquares(model.parameters(), momentum=0.5)
    optimizer.step(fit(model))
    model[0].weight.requires_grad_(False)
    before = fit(model)().item()
    for _ in range(3):
        optimizer.step(fit(model))
    assert fit(model)().item() < before


def test_loss_that_is_not_finite_changes_nothing() -> None:
    model = network()
    before, optimizer = flat(model), LeastSquares(model.parameters(), max_refusals=2)
    closure = lambda: fit(model)() * math.nan
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    with pytest.raises(NonFiniteLossError):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)


@pytest.mark.filterwarnings("ignore:.*not recognised")
def test_step_that_leaves_the_domain_is_shortened() -> None:
    """Residuals that are not a number a little further on."""
    w = nn.Parameter(torch.tensor([1.0, 0.5], dtype=F64))
    optimizer = LeastSquares([w])
    closure = lambda: ((w * 1.0).log() + 3).square().sum()
    for _ in range(60):
        before = closure().item()
        optimizer.step(closure)
        assert closure().item() <= before
    assert closure() < 1e-10


def test_nothing_acceptable_changes_nothing() -> None:
    model, calls = network(), 0
    before = flat(model)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return fit(model)() * (1.0 if calls <= 2 else 100.0)

    optimizer = LeastSquares(model.parameters(), max_trials=5)
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.outcome is StepOutcome.REJECTED
    assert torch.equal(flat(model), before)
    damping = optimizer.state_dict()["least_squares"]["memory"]["damping"]
    assert damping == pytest.approx(10 * ContractionDamping().initial)


def test_other_losses_are_refused_and_change_nothing() -> None:
    model = network()
    before, state = flat(model), torch.get_rng_state()
    optimizer = LeastSquares(model.parameters())
    with pytest.raises(ValueError, match="sum of squares"):
        optimizer.step(lambda: model(X + torch.randn(3)).abs().mean())
    assert torch.equal(flat(model), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "options",
    [{"corrections": 0}, {"max_trials": 0}, {"share": -1.0}, {"share": math.inf}, {"tolerance": -1.0},
     {"max_refusals": 0}, {"momentum": -0.1}, {"momentum": 1.0}],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least"):
        LeastSquares(network().parameters(), **options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"damping": 1e-3}, "ContractionDamping"), ({"factorisation": "dense"}, "Factorisation"),
     ({"scaling": "columns"}, "Scaling")],
)  # fmt: skip
def test_options_of_another_kind(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(TypeError, match=wanted):
        LeastSquares(network().parameters(), **options)


# --- numbers of residuals that change ---------------------------------------------------------------------------

CHANGING: dict[str, Callable[[Tensor], Tensor]] = {
    "violated": lambda r: r[r.detach() > 0.3],
    "indices": lambda r: r[(r.detach() > 0.3).nonzero()[:, 0]],
    "one or none": lambda r: r[r.detach() > 0.9 * r.detach().max()],
    "counted twice": lambda r: r.repeat_interleave((r.detach() > 0.3).long() + 1),
    "up to the largest": lambda r: r[: int(r.detach().argmax()) + 1],
}
CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one correction": {"corrections": 1},
    "momentum": {"momentum": 0.9},
    "earlier draws": {"recall": EarlierDraws()},
    "scaled": {"scaling": ColumnNorms()},
    "bounded": {"box": Box(torch.full((41,), -3.0, dtype=F64), torch.full((41,), 3.0, dtype=F64))},
    "decay": {"weight_decay": 1e-3},
    "shortened": {"lr": 0.5},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", CHANGING)
def test_numbers_of_residuals_that_change_with_the_parameters(name: str, choice: str) -> None:
    """Steps are judged by the loss, which the record tells."""
    numbers: list[int] = []
    for seed in range(4):
        model = network(seed)

        def closure(model: nn.Module = model) -> Tensor:
            residuals = CHANGING[name]((model(X) - Y)[:, 0])
            numbers.append(len(residuals))
            return residuals.square().sum()

        optimizer, penalty = LeastSquares(model.parameters(), **CHOICES[choice]), CHOICES[choice].get("weight_decay", 0)
        of = lambda model=model, closure=closure, penalty=penalty: (
            float(closure().detach()) + penalty / 2 * float(flat(model).square().sum())
        )
        for _ in range(8):
            before = of()
            if not numbers[-1]:
                break
            optimizer.step(closure)
            record, after = optimizer.last_step, of()
            assert record.new_loss == pytest.approx(after, rel=1e-9, abs=1e-13)
            assert after <= before * (1 + 1e-12) + 1e-13
    assert len(set(numbers)) > 1


def test_violated_constraints_are_met() -> None:
    for seed in range(4):
        model = network(seed)
        left = lambda model=model: F.relu(((model(X) - Y)[:, 0]).detach() - 0.3)
        violated = lambda model=model: (lambda r: r[r.detach() > 0.3].square().sum())((model(X) - Y)[:, 0])
        optimizer = LeastSquares(model.parameters())
        for _ in range(20):
            optimizer.step(violated)
        assert not bool(left().any())


def test_decreases_of_other_numbers_of_residuals() -> None:
    for before, after in ((normal(3), normal(1)), (normal(1), normal(3)), (normal(2), normal(0))):
        expected = (float(before.square().sum()) - float(after.square().sum())) / 2
        assert decrease_of(before, after) == pytest.approx(expected, rel=1e-14)


def test_balanced_terms_keep_their_numbers() -> None:
    model = network()

    def closure() -> Tensor:
        r = (model(X) - Y)[:, 0]
        return r[r.detach() > 0.1].square().mean() + r[:3].square().mean()

    optimizer = LeastSquares(model.parameters(), balance=EqualTraces())
    step = lambda: [optimizer.step(closure) for _ in range(20)]
    with pytest.raises(ValueError, match=r"at a trial point, and balance .* torch\.where"):
        step()


# --- constants beside the squares -------------------------------------------------------------------------------

FOLLOWING: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated": lambda r: torch.where(r.abs() < 0.7, r.square(), 0.49).sum(),
    "filled": lambda r: r.square().masked_fill(r.abs() > 0.7, 0.49).sum(),
    "joined": lambda r: torch.cat([r[r.abs() < 0.7].square(), torch.full((int((r.abs() >= 0.7).sum()),), 0.49)]).sum(),
    "stacked": lambda r: torch.stack([r.square().mean(), r.detach().abs().mean()]).sum(),
    "counted": lambda r: r[r.abs() < 0.7].square().sum() + 0.49 * (r.abs() >= 0.7).sum(),
    "a number": lambda r: r.square().mean() - r.abs().mean().item(),
    "detached": lambda r: r.square().mean() + r.detach().square().mean(),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_constants_that_follow_the_parameters_are_refused(name: str) -> None:
    """They have no derivative, and no residuals that a step could be judged by."""
    model = network()
    optimizer = LeastSquares(model.parameters())
    closure = lambda: FOLLOWING[name]((model(X) + Y * torch.tensor([-2.0, -1.0, 1.0])).flatten())
    start = flat(model)

    def steps() -> None:
        nonlocal start
        for _ in range(20):
            start = flat(model)
            optimizer.step(closure)

    with pytest.raises(NoResidualsError, match="and has no derivative"):
        steps()
    assert torch.equal(flat(model), start)


def test_constants_that_follow_the_parameters_late() -> None:
    """Once trials run as a list of operators, too."""
    model, level, called = network(), 1e9, []
    optimizer = LeastSquares(model.parameters())
    target = Y.clone()

    def closure() -> Tensor:
        called.append(level)
        r = model(X) - target
        return torch.where(r.abs() < level, r.square(), level**2).sum()

    for _ in range(12):
        optimizer.step(closure)
    called.clear()
    optimizer.step(closure)
    assert len(called) == 2  # where the step begins, and for the gradient where it ends
    level = 1.2
    target += 2 * normal(*Y.shape, seed=3)
    steps = lambda: [optimizer.step(closure) for _ in range(12)]
    with pytest.raises(NoResidualsError, match="and has no derivative"):
        steps()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_constants_within_squares_count(dtype: torch.dtype) -> None:
    model, x, y = network().to(dtype), X.to(dtype), 2 * Y.to(dtype)
    optimizer = LeastSquares(model.parameters())
    closure = lambda: (lambda r: torch.where(r.abs() < 0.7, r, 0.7).square().sum())(model(x) - y)
    for _ in range(20):
        before = float(closure().detach())
        optimizer.step(closure)
        after = float(closure().detach())
        assert optimizer.last_step.new_loss == pytest.approx(after, rel=1e-5, abs=1e-12)
        assert after <= before * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_constants_that_stay(dtype: torch.dtype) -> None:
    """Steps are bit for bit those without, however small the squares."""
    ends = []
    for constant in (0.0, 7.0, -1e3):
        model, x, y = network().to(dtype), X.to(dtype), Y.to(dtype)
        optimizer = LeastSquares(model.parameters())
        for _ in range(25):
            optimizer.step(lambda: constant + F.mse_loss(model(x), y))  # noqa: B023
        ends.append(flat(model))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("balance", [None, EqualTraces()], ids=["plain", "balanced"])
def test_gradients_at_trial_points_of_checkpointed_layers(balance) -> None:
    """A checkpoint runs again what the trial has run, and no other kernel than that, where the next step must start."""

    def losses(own: Callable[..., Tensor]) -> list[float]:
        torch.manual_seed(0)
        layer, head, x = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2), normal(6, 4, 2).float()
        run = lambda x: layer(x)[0][:, -1]

        def loss() -> Tensor:
            z, last = head(own(run, x)).unbind(1)
            # A square root may have a derivative that is not finite: every step that is taken is looked at.
            return (torch.where(z > 0, z.clamp(min=1e-3).sqrt(), 0.1 * z) - 0.5).square().mean() + last.square().mean()

        optimizer = LeastSquares([*layer.parameters(), *head.parameters()], balance=balance)
        return [float(optimizer.step(loss)) for _ in range(3)]

    again, plain = losses(lambda run, x: checkpoint(run, x, use_reentrant=False)), losses(lambda run, x: run(x))
    assert again[:2] == pytest.approx(plain[:2], rel=1e-3)
    assert again[2] < again[0] / 10
