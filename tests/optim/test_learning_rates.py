"""Learning rates and the bound on steps: what schedulers write is what is taken of a step."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from imstep.curvature import ParameterVector
from imstep.globalization import Armijo, FixedStep, StrongWolfe, TaylorMonitor, TrustRegion
from imstep.optim import (
    BlendedConjugateGradient,
    ExactHessian,
    GeneralizedLanczos,
    LeastSquares,
    NewtonKrylov,
    NoPreconditioning,
    StepOutcome,
)

F64 = torch.float64
Optimizer = NewtonKrylov | LeastSquares
Make = Callable[..., Optimizer]

METHODS: dict[str, Make] = {
    "default": NewtonKrylov,
    "hessian": lambda p, **o: NewtonKrylov(p, curvature=ExactHessian(), **o),
    "armijo": lambda p, **o: NewtonKrylov(p, step=Armijo(), **o),
    "wolfe": lambda p, **o: NewtonKrylov(p, step=StrongWolfe(), **o),
    "fixed": lambda p, **o: NewtonKrylov(p, step=FixedStep(0.5), **o),
    "gltr": lambda p, **o: NewtonKrylov(p, solver=GeneralizedLanczos(), step=TaylorMonitor(radius=1.0), **o),
    "trust region": lambda p, **o: NewtonKrylov(p, solver=GeneralizedLanczos(), step=TrustRegion(), **o),
    "momentum": lambda p, **o: NewtonKrylov(p, momentum=True, **o),
    "batches": lambda p, **o: NewtonKrylov.for_batches(p, **o),
    "least squares": LeastSquares,
    "least squares, momentum": lambda p, **o: LeastSquares(p, momentum=0.5, **o),
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Make:
    return METHODS[request.param]


def problem(dtype: torch.dtype = F64) -> tuple[nn.Sequential, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    x, y = torch.randn(30, 3, generator=generator).to(dtype), torch.randn(30, 2, generator=generator).to(dtype)
    return model, lambda: F.mse_loss(model(x), y)


def flat(model: nn.Module) -> Tensor:
    return ParameterVector(model).get()


def moves(make: Make, steps: int = 1, **options: Any) -> tuple[list[Tensor], Optimizer]:
    model, closure = problem()
    optimizer = make(model.parameters(), **options)
    at, found = flat(model), []
    for _ in range(steps):
        optimizer.step(closure)
        found.append(flat(model) - at)
        at = flat(model)
    return found, optimizer


# --- one learning rate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.5, 0.01])
def test_the_first_step_is_a_multiple_of_the_whole_one(make: Make, lr: float) -> None:
    (whole,), _ = moves(make)
    (part,), optimizer = moves(make, lr=lr)
    torch.testing.assert_close(part, lr * whole, rtol=1e-9, atol=1e-12)
    assert optimizer.last_step.step_norm == pytest.approx(float(part.norm()))


def test_a_whole_step_is_the_same_to_the_bit(make: Make) -> None:
    first, second = (moves(make, steps=4, **options)[0] for options in ({}, {"lr": 1.0, "max_step_norm": 1e9}))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_record_tells_the_loss_where_the_step_has_ended(make: Make) -> None:
    model, closure = problem()
    optimizer = make(model.parameters(), lr=0.3)
    for _ in range(4):
        optimizer.step(closure)
        assert optimizer.last_step.new_loss == pytest.approx(float(closure().detach()), rel=1e-9)
        assert optimizer.last_step.new_loss < optimizer.last_step.loss


@pytest.mark.parametrize("lr", [0.5, 0.75])
def test_convergence_is_linear_by_one_minus_lr(lr: float) -> None:
    """On a quadratic whose Newton step is exact."""
    w = nn.Parameter(torch.tensor([3.0, -2.0], dtype=F64))
    loss = lambda: w[0] ** 2 + 5 * w[1] ** 2
    optimizer = NewtonKrylov([w], lr=lr, curvature=ExactHessian(), preconditioning=NoPreconditioning())
    for _ in range(6):
        optimizer.step(loss)
    before = w.detach().clone()
    optimizer.step(loss)
    torch.testing.assert_close(w.detach(), (1 - lr) * before, rtol=2e-2, atol=0)


def test_zero_moves_nothing_and_goes_on(make: Make) -> None:
    model, closure = problem()
    model.insert(1, nn.BatchNorm1d(8).double()) if make is NewtonKrylov else None
    at = flat(model)
    optimizer = make(model.parameters(), lr=0.0)
    for _ in range(3):
        optimizer.step(closure)
        record = optimizer.last_step
        assert torch.equal(flat(model), at)
        assert record.outcome is StepOutcome.ACCEPTED
        assert record.step_norm == 0
        assert record.new_loss == record.loss
    assert make is not NewtonKrylov or float(model[1].num_batches_tracked) == 3
    optimizer.param_groups[0]["lr"] = 1.0
    loss = float(closure().detach())
    for _ in range(5):
        optimizer.step(closure)
    assert float(closure().detach()) < 0.7 * loss


@pytest.mark.parametrize("lr", [1.7, 2.5, 100.0])
def test_more_than_whole_steps_never_raise_the_loss(make: Make, lr: float) -> None:
    model, closure = problem()
    optimizer = make(model.parameters(), lr=lr)
    if isinstance(optimizer, NewtonKrylov) and isinstance(optimizer._strategies.step, FixedStep):
        pytest.skip("a fixed step accepts whatever is finite")
    losses = []
    for _ in range(6):
        losses.append(float(optimizer.step(closure)))
        assert optimizer.last_step.accepted
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_out_of_a_saddle() -> None:
    """The step along negative curvature is scaled as all are, and groups that do not move stay."""
    for rates in ([0.5, 0.5], [0.5, 0.0]):
        pair = [nn.Parameter(torch.zeros(1, dtype=F64)) for _ in range(2)]
        loss = lambda pair=pair: (pair[0] ** 2 - 1) ** 2 + (pair[1] ** 2 - 1) ** 2 + 1
        optimizer = NewtonKrylov([{"params": [p], "lr": lr} for p, lr in zip(pair, rates, strict=True)])
        optimizer.step(lambda loss=loss: loss().sum())
        assert optimizer.last_step.accepted
        assert bool(pair[0] != 0)
        assert bool(pair[1] != 0) == (rates[1] > 0)
        assert float(loss().detach()) == pytest.approx(optimizer.last_step.new_loss)
        assert optimizer.last_step.new_loss < 3


def test_damping_and_trust_do_not_depend_on_it() -> None:
    """They are learnt from the step that was found, whatever is taken of it."""
    states = [moves(NewtonKrylov, lr=lr)[1].state_dict()["newton_krylov"]["memory"] for lr in (1.0, 0.0, 1e-3)]
    for name in ("search", "damping", "curvature_scale", "progress"):
        assert states[0][name] == states[1][name] == states[2][name]


# --- groups ---------------------------------------------------------------------------------------------------------


def grouped(make: Make, rates: tuple[Any, Any], **options: Any) -> tuple[nn.Module, Callable[[], Tensor], Optimizer]:
    model, closure = problem()
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip((model[0], model[2]), rates, strict=True)]
    return model, closure, make(groups, **options)


def test_groups_take_their_parts_of_one_step(make: Make) -> None:
    (whole,), _ = moves(make)
    model, closure, optimizer = grouped(make, (0.1, 1.0))
    at = flat(model)
    optimizer.step(closure)
    factors = ParameterVector(model).spread([0.1, 0.1, 1.0, 1.0])
    found = flat(model) - at
    share = float(found @ (factors * whole) / (factors * whole).square().sum())  # 1, 1/2, 1/4, ...: the loss decides
    if isinstance(optimizer, NewtonKrylov):
        torch.testing.assert_close(found, share * factors * whole, rtol=1e-9, atol=1e-12)
        assert math.log2(share) == pytest.approx(round(math.log2(share)), abs=1e-9)
    assert float(closure().detach()) == pytest.approx(optimizer.last_step.new_loss)
    assert optimizer.last_step.new_loss < optimizer.last_step.loss


def test_equal_rates_of_groups_are_one(make: Make) -> None:
    (one,), _ = moves(make, lr=0.5)
    model, closure, optimizer = grouped(make, (0.5, torch.tensor(0.5)))
    at = flat(model)
    optimizer.step(closure)
    assert torch.equal(flat(model) - at, one)


def test_a_group_at_rate_zero_stays(make: Make) -> None:
    model, closure, optimizer = grouped(make, (0.0, 1.0))
    first, last = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    for _ in range(5):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, first)
    assert not torch.equal(model[2].weight, last)
    assert optimizer.last_step.new_loss < 0.9 * float(problem()[1]())


def test_shares_of_groups_that_do_not_descend() -> None:
    """d = -(A + λI)⁻¹g descends, and its part in the first variable alone rises: the step is made of -D g."""
    a, b = (nn.Parameter(torch.tensor([v], dtype=F64)) for v in (0.0, 0.0))
    quadratic = lambda: (0.5 * (a**2 + 10 * b**2) + 3 * a * b + 0.1 * a + b).sum()
    hessian, gradient = torch.tensor([[1.0, 3.0], [3.0, 10.0]], dtype=F64), torch.tensor([0.1, 1.0], dtype=F64)
    newton = -torch.linalg.solve(hessian, gradient)
    assert gradient[0] * newton[0] > 0
    optimizer = NewtonKrylov([{"params": [a]}, {"params": [b], "lr": 0.0}], preconditioning=NoPreconditioning())
    for _ in range(20):
        optimizer.step(quadratic)
        assert optimizer.last_step.accepted
        assert optimizer.last_step.new_loss < optimizer.last_step.loss
        if float(a + 0.1) ** 2 < 1e-12:
            break
    assert float(a) == pytest.approx(-0.1, rel=1e-5)
    assert float(b) == 0


def test_groups_converge_each_at_its_rate() -> None:
    """On a separable quadratic the error of a group shrinks by 1 - lr."""
    a, b = (nn.Parameter(torch.tensor([v], dtype=F64)) for v in (3.0, -2.0))
    loss = lambda: (a**2 + 50 * b**2).sum()
    groups = [{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.5}]
    optimizer = NewtonKrylov(groups, curvature=ExactHessian(), preconditioning=NoPreconditioning())
    for _ in range(4):
        optimizer.step(loss)
    before = float(b)
    optimizer.step(loss)
    assert float(b) == pytest.approx(0.5 * before, rel=1e-2)
    assert abs(float(a)) < 1e-3


# --- schedulers -----------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: min(1.0, epoch / 3)),
    "step": lambda o: schedulers.StepLR(o, 2, gamma=0.5),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=1.0, total_steps=8, cycle_momentum=False),
    "cyclic": lambda o: schedulers.CyclicLR(o, base_lr=0.1, max_lr=1.0, step_size_up=2, cycle_momentum=False),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=8),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "averaging": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.2, anneal_epochs=3),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, factor=0.5, total_iters=2), schedulers.ExponentialLR(o, gamma=0.9)]
    ),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.PolynomialLR(o, total_iters=5)], milestones=[3]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
def test_schedulers(schedule: str, method: Make) -> None:
    """The factor on each step is what torch.optim.SGD's group has at the same time."""
    model, closure = problem()
    as_tensor = schedule in ("one cycle", "cosine", "lambda")
    optimizer = method(model.parameters(), lr=torch.tensor(0.8) if as_tensor else 0.8)
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    ours, theirs = SCHEDULERS[schedule](optimizer), SCHEDULERS[schedule](sgd)
    rates = []
    for _ in range(8):
        expected = float(sgd.param_groups[0]["lr"])
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(expected, abs=1e-7)
        loss = optimizer.step(closure)
        sgd.step()
        record = optimizer.last_step
        rates.append(record.step_norm / (record.step_length * record.direction_norm))
        assert rates[-1] == pytest.approx(expected, rel=1e-6, abs=1e-7)
        for scheduler in (ours, theirs):
            scheduler.step(*([float(loss)] if schedule == "plateau" else []))
    assert schedule == "plateau" or len({round(rate, 6) for rate in rates}) > 1


def test_copies_of_a_scheduled_optimizer_step_by_themselves() -> None:
    """A scheduler replaces ``step`` by one that calls the original's."""
    model, closure = problem()
    optimizer = NewtonKrylov(model.parameters())
    schedulers.StepLR(optimizer, 2)
    optimizer.step(closure)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        at = flat(model)
        own = copied.param_groups[0]["params"]
        copied.step(lambda own=own: sum(p.square().sum() for p in own))
        assert torch.equal(flat(model), at)
        assert optimizer.last_step.step == 0
        assert copied.last_step.step == 1


def test_a_schedule_is_resumed() -> None:
    def begin() -> tuple[nn.Module, Callable[[], Tensor], Optimizer, Any]:
        model, closure = problem()
        optimizer = NewtonKrylov(model.parameters(), lr=0.8)
        return model, closure, optimizer, schedulers.CosineAnnealingLR(optimizer, T_max=6)

    def go(closure: Callable[[], Tensor], optimizer: Optimizer, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(closure)
            scheduler.step()

    model, *rest = begin()
    go(*rest, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, *rest[1:])], file)
    go(*rest, 3)
    file.seek(0)
    other, *others = begin()
    for part, state in zip((other, *others[1:]), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert others[1].param_groups[0]["lr"] == pytest.approx(0.4)
    go(*others, 3)
    assert torch.equal(flat(model), flat(other))


def test_a_state_without_rates_is_of_whole_steps() -> None:
    model, closure = problem()
    optimizer = NewtonKrylov(model.parameters())
    optimizer.step(closure)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["lr"]
    other = NewtonKrylov(model.parameters())
    other.load_state_dict(state)
    other.step(closure)
    assert other.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, "fast", None, torch.ones(2), torch.tensor(1j)])
def test_what_is_no_learning_rate(lr: Any) -> None:
    model, closure = problem()
    for method in (NewtonKrylov, LeastSquares):
        with pytest.raises(ValueError, match="lr of a parameter group is a finite number of at least 0"):
            method(model.parameters(), lr=lr)
        optimizer = method(model.parameters())
        with pytest.raises(ValueError, match="lr of a parameter group is a finite number of at least 0"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, dtype=F64))], "lr": lr})
        optimizer.param_groups[0]["lr"] = lr
        at = flat(model)
        with pytest.raises(ValueError, match=r"a scheduler that writes group\['lr'\]"):
            optimizer.step(closure)
        assert torch.equal(flat(model), at)


# --- the longest step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1.0, 0.5, 1.5])
def test_no_step_is_longer(make: Make, lr: float) -> None:
    (whole,), _ = moves(make, lr=lr)
    bound = 0.3 * float(whole.norm())
    found, optimizer = moves(make, steps=8, lr=lr, max_step_norm=bound)
    assert all(float(move.norm()) <= bound * (1 + 1e-9) for move in found)
    assert float(found[0].norm()) > 0.2 * bound
    assert optimizer.last_step.new_loss < 0.8 * float(problem()[1]())


def test_the_bound_of_groups() -> None:
    for method in (NewtonKrylov, LeastSquares):
        model, closure, optimizer = grouped(method, (0.2, 1.0), max_step_norm=0.05)
        for _ in range(5):
            at = flat(model)
            optimizer.step(closure)
            assert 0.01 < float((flat(model) - at).norm()) <= 0.05 * (1 + 1e-9)


def test_out_of_a_saddle_within_the_bound() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = NewtonKrylov([w], max_step_norm=0.1)
    optimizer.step(lambda: ((w**2 - 1) ** 2).sum())
    assert 0 < float(w.norm()) <= 0.1 * (1 + 1e-9)


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_what_is_no_bound(method: Make, bound: float) -> None:
    with pytest.raises(ValueError, match="max_step_norm, a length, is positive"):
        method([nn.Parameter(torch.ones(1))], max_step_norm=bound)


# --- closures, as frameworks ask for them ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [NewtonKrylov, LeastSquares])
def test_a_step_needs_its_closure(method: Make) -> None:
    model, closure = problem()
    optimizer = method(model.parameters())
    assert inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty
    assert inspect.signature(type(optimizer).step).parameters["closure"].default is inspect.Parameter.empty
    for call in (optimizer.step, lambda: optimizer.step(None), lambda: optimizer.step(closure=None)):
        with pytest.raises(TypeError, match=rf"{method.__name__}\.step needs a closure .*got nothing.*GradScaler"):
            call()
    with pytest.raises(TypeError, match="got a Tensor"):
        optimizer.step(closure())
    schedulers.StepLR(optimizer, 1)
    assert inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()
    optimizer.step(closure=closure)


def test_what_frameworks_ask_of_an_optimizer() -> None:
    model, closure = problem()
    optimizer = NewtonKrylov(model.parameters(), lr=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults["lr"] == optimizer.param_groups[0]["lr"] == 0.5
    assert len(optimizer.state) == 1
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step(closure)
    assert seen == ["before", "after"]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"[Cc]losure"):
        torch.amp.GradScaler("cpu").step(optimizer, closure=closure)


def test_options_of_others_in_groups() -> None:
    model, closure = problem()
    groups = [{"params": list(model.parameters()), "name": "all", "lr": 0.5, "initial_lr": 0.8}]
    optimizer = NewtonKrylov(groups)
    schedulers.StepLR(optimizer, 2, last_epoch=3)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["name"] == "all"
    with pytest.raises(ValueError, match=r"makes no use of: betas, eps\. .*groups may differ in lr"):
        NewtonKrylov([{"params": list(model.parameters()), "betas": (0.9, 0.99), "eps": 1e-8}])


def test_a_blend_at_half_rate_trains() -> None:
    model, closure = problem(torch.float32)
    optimizer = NewtonKrylov.for_batches(model.parameters(), lr=0.5, solver=BlendedConjugateGradient())
    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]


def test_repr_is_short_and_tells_what_was_chosen() -> None:
    model, _ = problem(torch.float32)
    groups = [{"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.1}, {"params": model[2].parameters()}]
    text = repr(NewtonKrylov(groups, step=TaylorMonitor(theta=0.1), max_step_norm=2.0))
    assert text.startswith("NewtonKrylov(50 parameters, float32 on cpu, lr=0.5 and 1, weight_decay=0.1 and 0, ")
    assert "max_step_norm=2, " in text
    assert "step=TaylorMonitor(theta=0.1)" in text
    assert "solver=ConjugateGradient()" in text
    assert len(text) < 400
    assert "factorisation=ByShape()" in repr(LeastSquares(model.parameters()))
