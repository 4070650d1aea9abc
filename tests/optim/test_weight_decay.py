"""Weight decay is a penalty ½λ‖w‖² in loss, gradient, curvature, residuals and trials, as if in the closure."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep import methods
from imstep.curvature import ParameterVector
from imstep.globalization import ContractionDamping, ExactEstimate, StrongWolfe, TaylorMonitor
from imstep.linalg import (
    DenseFactorisation,
    NoiseTest,
    NormalEquations,
    PivotedCholesky,
    PivotedQR,
    RandomizedNystrom,
    ThinFactorisation,
)
from imstep.optim import (
    Box,
    ColumnNorms,
    ConjugateGradient,
    Direct,
    ExactHessian,
    Hutchinson,
    Kronecker,
    LeastSquares,
    NewtonKrylov,
    NoPreconditioning,
    Nystrom,
    Recycling,
    SteihaugToint,
    StepOutcome,
)

F64 = torch.float64
Closure = Callable[[], Any]
Rates = float | Sequence[float]

PLAIN = {"preconditioning": NoPreconditioning()}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gauss-newton": PLAIN,
    "hessian": {**PLAIN, "curvature": ExactHessian()},
    "exact error": {**PLAIN, "step": TaylorMonitor(error=ExactEstimate())},
    "wolfe": {**PLAIN, "step": StrongWolfe()},
    "recycling": {"preconditioning": Recycling(NoPreconditioning(), pairs=5), "momentum": True},
    "nystrom": {"preconditioning": Nystrom(rank=4)},
    "hutchinson": {"preconditioning": Hutchinson(every=2)},
    "direct": {**PLAIN, "curvature": ExactHessian(), "solver": Direct()},
    "steihaug": {**PLAIN, "solver": SteihaugToint(), "step": TaylorMonitor(radius=1.0)},
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def network(hidden: int = 6, dtype: torch.dtype = F64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model


GENERATOR = torch.Generator().manual_seed(4)
X, Y = torch.randn(12, 3, generator=GENERATOR).double(), torch.randn(12, 2, generator=GENERATOR).double()
LABELS = torch.randint(2, (12,), generator=GENERATOR)

LOSSES: dict[str, Callable[[nn.Module], Tensor]] = {
    "squares": lambda model: F.mse_loss(model(X), Y),
    "cross entropy": lambda model: F.cross_entropy(model(X), LABELS),
    "no convex end": lambda model: (model(X) - Y).square().sum(1).add(1).log().sum(),
}


def penalty_of(model: nn.Module, rates: Rates) -> Tensor:
    tensors = list(model.parameters())
    each = [rates] * len(tensors) if isinstance(rates, float) else rates
    return sum(rate / 2 * p.square().sum() for rate, p in zip(each, tensors, strict=True))


def groups_of(model: nn.Module, rates: Sequence[float]) -> list[dict[str, Any]]:
    return [{"params": [p], "weight_decay": rate} for p, rate in zip(model.parameters(), rates, strict=True)]


def flat(model: nn.Module) -> Tensor:
    return ParameterVector(model).get()


BIASES_FREE = (0.1, 0.0, 0.03, 0.0)


# --- Newton-Krylov --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("rates", [0.05, BIASES_FREE])
def test_steps_as_if_written_into_the_closure(name: str, loss: str, rates: Rates) -> None:
    paths = []
    for inside in (False, True):
        model = network()
        params = model.parameters() if inside or isinstance(rates, float) else groups_of(model, rates)
        optimizer = NewtonKrylov(
            params, weight_decay=rates if isinstance(rates, float) and not inside else 0.0, **CONFIGURATIONS[name]
        )
        added = (lambda model=model: penalty_of(model, rates)) if inside else (lambda: 0)
        closure = lambda model=model, added=added: LOSSES[loss](model) + added()
        path = []
        for _ in range(3):  # further on, long solves amplify rounding
            optimizer.step(closure)
            record = optimizer.last_step
            path.append((flat(model), record.loss, record.new_loss, record.gradient_norm, record.damping))
        paths.append(path)
    for ours, theirs in zip(*paths, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-8)
        assert ours[1:] == pytest.approx(theirs[1:], rel=1e-6)


def test_closures_that_call_backward() -> None:
    paths = []
    for backward in (False, True):
        model = network()
        optimizer = NewtonKrylov(model.parameters(), weight_decay=0.1)

        def closure(model: nn.Module = model, optimizer: Any = optimizer, backward: bool = backward) -> Any:
            loss = LOSSES["squares"](model)
            if backward:
                optimizer.zero_grad()
                loss.backward()
                return None
            return loss

        losses = [float(optimizer.step(closure)) for _ in range(4)]
        paths.append([*losses, *flat(model).tolist()])
    assert paths[0] == pytest.approx(paths[1], rel=1e-9)


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
def test_what_a_step_tells(method: Any) -> None:
    """The closure's loss comes back, its gradient is left in place; the record keeps both parts."""
    model, rates = network(), BIASES_FREE
    optimizer = method(groups_of(model, rates))
    closure = lambda: LOSSES["squares"](model)
    for _ in range(3):
        loss, penalty = closure(), float(penalty_of(model, rates).detach())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        both = torch.autograd.grad(closure() + penalty_of(model, rates), list(model.parameters()))
        assert float(optimizer.step(closure)) == float(loss.detach())
        record = optimizer.last_step
        for p, g in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
        assert record.gradient_norm == pytest.approx(float(torch.cat([g.flatten() for g in both]).norm()))
        assert record.penalty == pytest.approx(penalty)
        assert record.loss - record.penalty == pytest.approx(float(loss.detach()))
        assert record.new_penalty == pytest.approx(float(penalty_of(model, rates).detach()))
        assert record.new_loss - record.new_penalty == pytest.approx(float(closure().detach()))
        assert record.new_loss < record.loss


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
def test_the_minimum_is_that_of_the_penalised_loss(method: Any) -> None:
    """Ridge regression: w = (XᵀX + λ N/2 I)⁻¹ Xᵀy for a mean of squares."""
    model = nn.Linear(3, 1, bias=False).double()
    y = Y[:, :1]
    optimizer = method(model.parameters(), weight_decay=0.3)
    for _ in range(20):
        optimizer.step(lambda: F.mse_loss(model(X), y))
    expected = torch.linalg.solve(X.mT @ X + 0.3 * len(X) / 2 * torch.eye(3, dtype=F64), X.mT @ y)
    torch.testing.assert_close(model.weight.detach().mT, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
def test_none_changes_no_bit(method: Any) -> None:
    paths = []
    for options in ({}, {"weight_decay": 0.0}):
        model = network()
        optimizer = method(model.parameters(), **options)
        for _ in range(4):
            optimizer.step(lambda model=model: LOSSES["squares"](model))
        paths.append(flat(model))
    assert torch.equal(*paths)
    assert optimizer.last_step.penalty == optimizer.last_step.new_penalty == 0


def test_the_curvature_of_halves() -> None:
    """The penalty is of no examples: it adds to both halves alike, and the directions are those of a written one."""
    model = network()
    options = {"solver": ConjugateGradient(noise=NoiseTest(1.0)), **PLAIN}
    other = copy.deepcopy(model)
    for _ in range(3):
        NewtonKrylov(model.parameters(), weight_decay=0.2, **options).step(lambda: LOSSES["squares"](model))
        NewtonKrylov(other.parameters(), **options).step(lambda: LOSSES["squares"](other) + penalty_of(other, 0.2))
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-6, atol=1e-8)


def test_kronecker_factors_know_of_it() -> None:
    """Far beyond the curvature of the loss the penalty is all there is, and the preconditioner its inverse."""
    model = network(dtype=torch.float32)
    optimizer = NewtonKrylov(groups_of(model, (1e4, 1e2, 1e3, 1e2)), preconditioning=Kronecker())
    for _ in range(2):
        optimizer.step(lambda: F.mse_loss(model(X.float()), Y.float()))
    inverse = optimizer._preconditioner.operator(optimizer.last_step.damping)
    sizes = ParameterVector(model).spread([1e4, 1e2, 1e3, 1e2])
    images = inverse @ torch.ones(len(sizes))
    layers = [p.numel() for p in model.parameters()]
    for found, expected in zip(images.split(layers)[::2], (1e-4, 1e-3), strict=True):
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0.1, atol=0)


@pytest.mark.parametrize("preconditioning", [Kronecker(every=2), Recycling(Kronecker(every=1))])
def test_resumes_bit_for_bit_under_a_schedule(preconditioning: Any) -> None:
    def go(model: nn.Module, optimizer: NewtonKrylov, steps: range) -> None:
        for step in steps:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.01 * step
            optimizer.step(lambda: LOSSES["cross entropy"](model))

    model = network()
    optimizer = NewtonKrylov(model.parameters(), preconditioning=preconditioning)
    go(model, optimizer, range(4))
    other, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    go(model, optimizer, range(4, 8))
    resumed = NewtonKrylov(other.parameters(), preconditioning=preconditioning)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["weight_decay"] == 0.03
    go(other, resumed, range(4, 8))
    assert torch.equal(flat(model), flat(other))


def test_a_part_of_the_batch_for_curvature() -> None:
    paths = []
    for inside in (False, True):
        model = network()
        optimizer = NewtonKrylov(model.parameters(), weight_decay=0.0 if inside else 0.1, **PLAIN)
        added = (lambda model=model: penalty_of(model, 0.1)) if inside else (lambda: 0)
        whole = lambda model=model, added=added: F.mse_loss(model(X), Y) + added()
        part = lambda model=model, added=added: F.mse_loss(model(X[:6]), Y[:6]) + added()
        for _ in range(3):
            optimizer.step(whole, part)
        paths.append(flat(model))
    torch.testing.assert_close(*paths, rtol=1e-6, atol=1e-8)


def test_growing_batches_see_no_variance_in_it() -> None:
    variances = []
    for rate in (0.0, 0.5):
        model = network()
        optimizer = NewtonKrylov(model.parameters(), weight_decay=rate, variance_every=1)
        optimizer.step(lambda model=model: LOSSES["squares"](model))
        variances.append(optimizer.last_step.gradient_variance)
    assert variances[0] == pytest.approx(variances[1])


def test_complex_parameters() -> None:
    z = nn.Parameter(torch.tensor([1 + 2j, -0.5j], dtype=torch.complex128))
    optimizer = NewtonKrylov([z], weight_decay=0.5, curvature=ExactHessian())
    target = torch.tensor([2 - 1j, 1 + 1j], dtype=torch.complex128)
    for _ in range(20):
        optimizer.step(lambda: (z - target).abs().square().sum() / 2)
    torch.testing.assert_close(z.detach(), target / 1.5, rtol=1e-8, atol=1e-10)


def test_frozen_and_unused_parameters_do_not_decay() -> None:
    """As in PyTorch, where a parameter without a gradient is passed over."""
    for method in (NewtonKrylov, LeastSquares):
        model, unused = network(), nn.Parameter(torch.ones(3, dtype=F64))
        model[2].bias.requires_grad_(False)
        frozen = model[2].bias.detach().clone()
        optimizer = method([*model.parameters(), unused], weight_decay=0.5)
        for _ in range(3):
            optimizer.step(lambda model=model: LOSSES["squares"](model))
        assert torch.equal(unused, torch.ones(3, dtype=F64))
        assert torch.equal(model[2].bias, frozen)
        used = [p for p in model.parameters() if p.requires_grad]
        penalty = sum(0.25 * float(p.detach().square().sum()) for p in used)
        assert optimizer.last_step.new_penalty == pytest.approx(penalty)


@pytest.mark.parametrize(
    "make", [partial(NewtonKrylov, preconditioning=NoPreconditioning()), LeastSquares, methods.gauss_newton]
)
def test_what_later_pieces_alone_depend_on_decays(make: Callable[..., Any]) -> None:
    def run(pieces: bool) -> Tensor:
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh()).to(F64)
        first, second = nn.Linear(5, 2).to(F64), nn.Linear(5, 2).to(F64)
        x = torch.randn(30, 3, dtype=F64)
        parameters = [p for module in (trunk, first, second) for p in module.parameters()]
        tasks = [partial(lambda head: (head(trunk(x)) - x[:, :2].sin()).square().mean(), h) for h in (first, second)]
        optimizer = make(parameters, weight_decay=0.1)
        for _ in range(3):
            optimizer.step(tasks if pieces else lambda: tasks[0]() + tasks[1]())
        penalty = 0.05 * float(sum(p.detach().square().sum() for p in parameters))
        assert optimizer.last_step.new_penalty == pytest.approx(penalty, rel=1e-12)
        return torch.cat([p.detach().flatten() for p in parameters])

    torch.testing.assert_close(run(pieces=True), run(pieces=False), rtol=1e-7, atol=1e-9)


def test_entries_that_hooks_hold_do_not_decay() -> None:
    model = network()
    mask = torch.ones(6, 3, dtype=F64).triu()
    model[0].weight.register_hook(lambda g: g * mask)
    before = model[0].weight.detach().clone()
    optimizer = NewtonKrylov(model.parameters(), weight_decay=0.5)
    for _ in range(3):
        optimizer.step(lambda: LOSSES["squares"](model))
    assert torch.equal(model[0].weight[mask == 0], before[mask == 0])
    assert not torch.equal(model[0].weight[mask == 1], before[mask == 1])


def test_a_saddle_of_the_loss_that_the_penalty_makes_a_minimum() -> None:
    for rate, outcome in ((0.5, StepOutcome.ACCEPTED), (3.0, StepOutcome.CONVERGED)):
        w = nn.Parameter(torch.zeros(2, dtype=F64))
        optimizer = NewtonKrylov([w], weight_decay=rate)
        optimizer.step(lambda w=w: (w[0] ** 2 - w[1] ** 2 + w[1] ** 4) * 1.0)
        assert optimizer.last_step.outcome is outcome


def test_half_precision() -> None:
    model = network(dtype=torch.bfloat16)
    optimizer = NewtonKrylov(model.parameters(), weight_decay=0.1)
    for _ in range(3):
        optimizer.step(lambda: F.mse_loss(model(X.bfloat16()).float(), Y.float()))
    assert math.isfinite(optimizer.last_step.new_loss)


# --- least squares --------------------------------------------------------------------------------------------------

FACTORISATIONS = {"dense": DenseFactorisation(), "thin": ThinFactorisation(), "normal": NormalEquations()}


@pytest.mark.parametrize("factorisation", FACTORISATIONS)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize(("hidden", "rate"), [(2, 0.05), (12, 1e-6), (12, 2.0)])
def test_residual_rows_that_are_not_there(factorisation: str, momentum: float, hidden: int, rate: float) -> None:
    """Against the penalty in the closure, whose squares are read as residuals √λ w."""
    paths = []
    for inside in (False, True):
        model = network(hidden)
        optimizer = LeastSquares(
            model.parameters(),
            weight_decay=0.0 if inside else rate,
            factorisation=FACTORISATIONS[factorisation],
            momentum=momentum,
        )
        added = (lambda model=model: penalty_of(model, rate)) if inside else (lambda: 0)
        path = []
        for _ in range(5):
            optimizer.step(lambda model=model, added=added: F.mse_loss(model(X), Y) + added())
            record = optimizer.last_step
            path.append((record.loss, record.new_loss, record.gradient_norm, record.rho, record.slope, flat(model)))
        paths.append(path)
    for ours, theirs in zip(*paths, strict=True):
        assert ours[:-1] == pytest.approx(theirs[:-1], rel=1e-5, nan_ok=True)
        torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("hidden", [2, 12])
@pytest.mark.parametrize("options", [{}, {"scaling": ColumnNorms()}, {"momentum": 0.5}])
def test_groups_whose_rates_differ(hidden: int, options: dict[str, Any]) -> None:
    """A step whose first λ will do is the one with the rows; steps lead as far down as those."""
    damping, moves, losses = ContractionDamping(initial=1.0, shrink=2.0), [], []  # slowly, on one path to one minimum
    for inside in (False, True):
        model = network(hidden)
        at = flat(model)
        params = model.parameters() if inside else groups_of(model, BIASES_FREE)
        # One correction, for the weights of several are found in other units.
        optimizer = LeastSquares(params, damping=damping, corrections=1, **options)
        added = (lambda model=model: penalty_of(model, BIASES_FREE)) if inside else (lambda: 0)
        closure = lambda model=model, added=added: F.mse_loss(model(X), Y) + added()
        optimizer.step(closure)
        moves.append(flat(model) - at)
        for _ in range(8):
            optimizer.step(closure)
        losses.append(optimizer.last_step.new_loss)
    if not options or "momentum" in options:
        torch.testing.assert_close(*moves, rtol=1e-6, atol=1e-8)
    assert losses[0] < 1.1 * losses[1]


FEW = [PivotedCholesky(), RandomizedNystrom(), DenseFactorisation(), PivotedQR(most=30)]


@pytest.mark.parametrize("factorisation", FEW)
@pytest.mark.parametrize("rates", [1e-2, (1e-2, 0.0, 2e-2, 0.0)])
def test_few_columns_lead_to_the_minimum(factorisation: Any, rates: Rates) -> None:
    """Of a linear fit with more parameters than residuals: the penalty is met beyond the span of few rows, too."""
    generator = torch.Generator().manual_seed(8)
    x = torch.rand(30, 40, generator=generator).double() * 0.7 ** torch.arange(40)
    y = x.sum(1, keepdim=True).sin()
    model = nn.Sequential(nn.Linear(40, 2), nn.Linear(2, 1)).double()
    model[1].requires_grad_(False)
    model[1].weight.fill_(1.0)
    used = rates if isinstance(rates, float) else rates[:2]
    params = model.parameters() if isinstance(used, float) else groups_of(model[0], used)
    rate = used if isinstance(used, float) else 0.0
    optimizer = LeastSquares(params, weight_decay=rate, factorisation=factorisation)
    for _ in range(25):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    loss = F.mse_loss(model(x), y) + penalty_of(model[0], used)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model[0].parameters()))])
    assert float(gradient.norm()) < 1e-7


def test_the_loss_never_rises_under_a_schedule() -> None:
    model = network(12)
    optimizer = LeastSquares(model.parameters())
    for step in range(12):
        optimizer.param_groups[0]["weight_decay"] = 0.1 / (1 + step)
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        assert optimizer.last_step.new_loss <= optimizer.last_step.loss


@pytest.mark.parametrize("options", [{"lr": 0.5}, {"max_step_norm": 0.2}, {"lr": 0.5, "max_step_norm": 0.1}])
def test_beside_learning_rates_and_bounds(options: dict[str, Any]) -> None:
    for method in (NewtonKrylov, LeastSquares):
        model = network(12)
        optimizer = method(groups_of(model, BIASES_FREE), **options)
        for _ in range(6):
            at = flat(model)
            optimizer.step(lambda model=model: F.mse_loss(model(X), Y))
            assert float((flat(model) - at).norm()) <= options.get("max_step_norm", math.inf) * (1 + 1e-9)
            both = F.mse_loss(model(X), Y) + penalty_of(model, BIASES_FREE)
            assert optimizer.last_step.new_loss == pytest.approx(float(both.detach()), rel=1e-9)
            assert optimizer.last_step.new_loss < optimizer.last_step.loss


def test_a_box_and_a_penalty() -> None:
    w = nn.Parameter(torch.ones(2, dtype=F64))
    bound = torch.full((2,), 5.0, dtype=F64)
    optimizer = LeastSquares([w], box=Box(-bound, bound), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay or a box, not both.*loss \+ weight_decay / 2"):
        optimizer.step(lambda: (w - 1).square().sum())
    optimizer = LeastSquares([w], box=Box(-bound, bound))
    optimizer.step(lambda: (w - 1).square().sum() + 0.05 * w.square().sum())


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, "much", None])
@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
def test_what_is_no_rate(method: Any, rate: Any) -> None:
    with pytest.raises(ValueError, match="weight_decay of a parameter group is a finite number of at least 0"):
        method([nn.Parameter(torch.ones(1))], weight_decay=rate)
