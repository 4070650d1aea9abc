"""What every configuration of the optimizer keeps to."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep.curvature import Empirical, MonteCarlo
from imstep.globalization import (
    Armijo,
    ExactEstimate,
    FixedStep,
    NoDamping,
    StrongWolfe,
    TaylorMonitor,
    TrustRegion,
)
from imstep.optim import (
    BFGS,
    SOAP,
    SR1,
    AutomaticRate,
    BlendedConjugateGradient,
    BlockBFGS,
    BlockDiagonal,
    ConjugateGradient,
    Direct,
    ExactHessian,
    FisherCurvature,
    FixedProducts,
    GeneralizedLanczos,
    Hutchinson,
    IterateBacktracking,
    Kronecker,
    KroneckerEigenbasis,
    LearntModel,
    LimitedMemoryBFGS,
    MinimalResidual,
    NewtonKrylov,
    NoPreconditioning,
    Nystrom,
    PreconditionedGradient,
    RandomSubspace,
    RankOneModel,
    Recycling,
    ResidualForcing,
    SelfScaledBroyden,
    SquaredGradients,
    SteihaugToint,
    StepOutcome,
)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "hessian": {"curvature": ExactHessian()},
    "plain": {"preconditioning": NoPreconditioning()},
    "residual": {"forcing": ResidualForcing()},
    "armijo": {"step": Armijo()},
    "strong wolfe": {"step": StrongWolfe()},
    "exact error": {"step": TaylorMonitor(error=ExactEstimate())},
    "fixed": {"step": FixedStep(0.2)},
    "literal": {
        "curvature": ExactHessian(),
        "preconditioning": NoPreconditioning(),
        "forcing": ResidualForcing(),
        "damping": NoDamping(),
        "solver": ConjugateGradient(curvature_floor=1e-8),
    },
    "eager refresh": {"preconditioning": Kronecker(every=1, decay=0.5)},
    "momentum": {"momentum": True},
    "scheduled": {"lr": 0.7, "max_step_norm": 5.0},
    "decayed": {"weight_decay": 1e-3},
    "blend": {
        "solver": BlendedConjugateGradient(),
        "forcing": FixedProducts(2),
        "step": Armijo(),
        "preconditioning": Kronecker(every=3),
    },
    "negative curvature": {"curvature": ExactHessian(), "solver": ConjugateGradient(follow=True)},
    "warm start": {"solver": ConjugateGradient(warm_start=0.5)},
    "iterates": {"solver": ConjugateGradient(warm_start=0.9, backtracking=IterateBacktracking(1.2))},
    "recycling": {"preconditioning": Recycling(pairs=5)},
    "recycling plainly": {"preconditioning": Recycling(NoPreconditioning(), pairs=3), "momentum": True},
    "hutchinson": {"preconditioning": Hutchinson(every=2, probes=2)},
    "squared gradients": {"preconditioning": SquaredGradients()},
    "nystrom": {"curvature": ExactHessian(), "preconditioning": Nystrom(rank=4, every=2, largest=8)},
    "recycled nystrom": {"preconditioning": Recycling(Nystrom(rank=3, every=3), pairs=3)},
    "bfgs": {
        "curvature": ExactHessian(),
        "solver": PreconditionedGradient(products=False),
        "preconditioning": BFGS(),
        "step": StrongWolfe(),
        "damping": NoDamping(),
    },
    "lbfgs": {"solver": PreconditionedGradient(products=False), "preconditioning": LimitedMemoryBFGS(exact=True)},
    "self-scaled broyden": {"preconditioning": SelfScaledBroyden(exact=True)},
    "rank-one model": {
        "curvature": ExactHessian(),
        "solver": LearntModel(),
        "preconditioning": RankOneModel(3),
        "step": TrustRegion(),
        "damping": NoDamping(),
    },
    "sr1": {"curvature": ExactHessian(), "preconditioning": SR1()},
    "block bfgs": {"preconditioning": BlockBFGS(columns=3, blocks=2)},
    "random subspace": {"curvature": ExactHessian(), "solver": RandomSubspace(40)},
    "automatic rate": {
        "solver": PreconditionedGradient(products=False),
        "preconditioning": AutomaticRate(Nystrom(rank=4, every=2), every=2, share=1.0),
        "step": Armijo(),
    },
    "sampled fisher, soap": {"curvature": FisherCurvature(MonteCarlo(2)), "preconditioning": SOAP(every=2)},
    "observed fisher, ekfac": {
        "curvature": FisherCurvature(Empirical()),
        "preconditioning": KroneckerEigenbasis(basis_every=2),
    },
    "block diagonal": {"solver": BlockDiagonal()},
    "minres": {"curvature": ExactHessian(), "solver": MinimalResidual()},
    "direct": {"curvature": ExactHessian(), "solver": Direct()},
    "gltr": {"curvature": ExactHessian(), "solver": GeneralizedLanczos(), "step": TaylorMonitor(radius=1.0)},
    "trust region": {"curvature": ExactHessian(), "solver": SteihaugToint(), "step": TaylorMonitor(radius=1.0)},
    "classical trust region": {
        "preconditioning": NoPreconditioning(),
        "solver": SteihaugToint(),
        "step": TrustRegion(),
        "damping": NoDamping(),
    },
}
Closure = Callable[[], Tensor]


@pytest.fixture(params=CONFIGURATIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGURATIONS[request.param]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Net(nn.Module):
    """Everything that a step must take care of: dropout, running statistics, a frozen and a shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.middle, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.middle.weight
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(6, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x)).tanh())
        return self.last(self.again(self.middle(x).tanh()).tanh())


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def batch(index: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(20, 4, generator=generator).to(dtype), torch.randint(3, (20,), generator=generator)


def closure_of(model: nn.Module, index: int = 0) -> Closure:
    x, labels = batch(index, next(model.parameters()).dtype)
    return lambda: F.cross_entropy(model(x), labels)


def lbfgs_form(optimizer: torch.optim.Optimizer, closure: Closure) -> Closure:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    return evaluate


def everything(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def identical(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(
    model: nn.Module, optimizer: NewtonKrylov, steps: range, form: Callable[..., Closure] | None = None
) -> list[Any]:
    records = []
    for index in steps:
        closure = closure_of(model, index % 3)
        optimizer.step(form(optimizer, closure) if form else closure)
        records.append(optimizer.last_step.to_dict() | {"seconds": 0.0})
    return records


def equal_records(a: list[Any], b: list[Any]) -> bool:
    return repr(a) == repr(b)  # nan is not equal to itself


@dataclass
class Usual:
    """Seven steps, made once for each configuration; lists and dicts by the number of steps before."""

    models: list[list[Tensor]]
    draws: list[Tensor]
    states: dict[int, Any]
    saved: dict[int, bytes]
    records: list[Any]
    model: Net
    optimizer: NewtonKrylov


@pytest.fixture
def usual(request: pytest.FixtureRequest, options: dict[str, Any]) -> Usual:
    return _usual(request.node.callspec.params["options"])


@cache
def _usual(name: str) -> Usual:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = net()
        optimizer = NewtonKrylov(model.parameters(), **CONFIGURATIONS[name])
        made = Usual([], [], {}, {}, [], model, optimizer)
        for step in range(8):
            made.models.append(everything(model))
            made.draws.append(torch.get_rng_state())
            if step in (2, 3):
                made.states[step] = optimizer.state_dict()
                torch.save({"model": model.state_dict(), "optimizer": made.states[step]}, file := io.BytesIO())
                made.saved[step] = file.getvalue()
            made.records += run(model, optimizer, range(step, min(step + 1, 7)))
        return made


def taken_up(usual: Usual, step: int, options: dict[str, Any], state: Any = None) -> tuple[nn.Module, NewtonKrylov]:
    """Another model and optimizer where the usual ones were after so many steps, as are random draws."""
    saved = torch.load(io.BytesIO(usual.saved[step]), weights_only=True)
    model = net()
    model.load_state_dict(saved["model"])
    optimizer = NewtonKrylov(model.parameters(), **options)
    optimizer.load_state_dict(saved["optimizer"] if state is None else state)
    torch.set_rng_state(usual.draws[step])
    return model, optimizer


def test_both_forms_of_closure_give_the_same_step_again_and_again(options: dict[str, Any], usual: Usual) -> None:
    torch.manual_seed(1)
    model = net()
    records = run(model, NewtonKrylov(model.parameters(), **options), range(4), lbfgs_form)
    assert identical(everything(model), usual.models[4])
    assert equal_records(records, usual.records[:4])
    assert torch.equal(torch.get_rng_state(), usual.draws[4])


def test_lowers_the_loss_and_never_raises_it(options: dict[str, Any]) -> None:
    dtype = torch.float32  # the others are in float64
    model = net(dtype).eval()
    optimizer = NewtonKrylov(model.parameters(), **options)
    closure = closure_of(model)
    losses = []
    for _ in range(8):
        optimizer.step(closure)
        losses.append(optimizer.last_step.loss)
    losses.append(optimizer.last_step.new_loss)
    penalty = optimizer.last_step.new_penalty
    assert losses[-1] - penalty == pytest.approx(float(closure().detach()), rel=20 * torch.finfo(dtype).eps)
    rounding = 20 * torch.finfo(dtype).eps
    if not isinstance(options.get("step"), FixedStep):
        assert all(b <= a + rounding * abs(a) for a, b in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype is dtype for p in model.parameters())


def test_resumes_bit_for_bit(options: dict[str, Any], usual: Usual) -> None:
    other, resumed = taken_up(usual, 3, options)
    assert equal_records(run(other, resumed, range(3, 7)), usual.records[3:])
    assert identical(everything(other), usual.models[7])
    assert resumed.cost == usual.optimizer.cost


def test_saved_state_is_numbers_and_tensors(options: dict[str, Any], usual: Usual) -> None:
    tensors: list[Tensor] = []

    def plain(item: Any) -> Any:
        if isinstance(item, Tensor):
            tensors.append(item)
            return {"tensor": len(tensors) - 1}
        if isinstance(item, dict):
            assert all(isinstance(key, str) for key in item)
            return {key: plain(value) for key, value in item.items()}
        return [plain(value) for value in item] if isinstance(item, (list, tuple)) else item

    def rebuilt(item: Any) -> Any:
        if isinstance(item, dict) and set(item) == {"tensor"}:
            return tensors[item["tensor"]]
        if isinstance(item, dict):
            return {key: rebuilt(value) for key, value in item.items()}
        return [rebuilt(value) for value in item] if isinstance(item, list) else item

    text = json.dumps(plain(torch.load(io.BytesIO(usual.saved[2]), weights_only=True)["optimizer"]))
    tensors = [t.clone() for t in tensors]
    other, resumed = taken_up(usual, 2, options, rebuilt(json.loads(text)))
    assert equal_records(run(other, resumed, range(2, 4)), usual.records[2:4])


def test_saved_state_does_not_change_later(usual: Usual) -> None:
    for step, state in usual.states.items():
        assert repr(state) == repr(torch.load(io.BytesIO(usual.saved[step]), weights_only=True)["optimizer"])


def test_frozen_parameters_stay(usual: Usual) -> None:
    fresh = net()
    assert torch.equal(usual.model.last.bias, fresh.last.bias)
    assert usual.model.last.bias.grad is None
    assert not torch.equal(usual.model.last.weight, fresh.last.weight)


def test_groups_are_one_problem(options: dict[str, Any], usual: Usual) -> None:
    torch.manual_seed(1)
    model = net()
    params = list(model.parameters())
    optimizer = NewtonKrylov([{"params": params[:3]}, {"params": params[3:]}], **options)
    run(model, optimizer, range(3))
    assert identical(everything(model), usual.models[3])


def test_gradient_is_left_in_place(options: dict[str, Any]) -> None:
    model = net().eval()
    optimizer = NewtonKrylov(model.parameters(), **options)
    closure = closure_of(model)
    params = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(closure(), params)
    returned = optimizer.step(closure)
    for p, g in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)
    assert returned.shape == ()
    assert not returned.requires_grad
    assert float(returned) == pytest.approx(optimizer.last_step.loss - optimizer.last_step.penalty, rel=1e-12)


def test_zero_gradient_converges_where_it_is(options: dict[str, Any]) -> None:
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = NewtonKrylov([w], **options)
    for _ in range(2):
        loss = optimizer.step(lambda: (w**2).sum() + 1)
        assert optimizer.last_step.outcome is StepOutcome.CONVERGED
        assert float(loss) == optimizer.last_step.new_loss == 1
        assert not w.any()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(options: dict[str, Any], usual: Usual, bad: float) -> None:
    model, optimizer = taken_up(usual, 2, options)
    before, saved = everything(model), copy.deepcopy(optimizer.state_dict()["newton_krylov"])
    good = closure_of(model)
    loss = optimizer.step(lambda: good() * bad)
    assert not math.isfinite(float(loss))
    assert optimizer.last_step.outcome is StepOutcome.NON_FINITE
    assert identical(everything(model), before)
    after = optimizer.state_dict()["newton_krylov"]
    assert after["memory"]["refusals"] == 1
    assert after["memory"]["steps"] == 3
    assert repr(after["preconditioner"]) == repr(saved["preconditioner"])
    optimizer.step(good)
    assert optimizer.last_step.outcome is not StepOutcome.NON_FINITE
    assert optimizer.state_dict()["newton_krylov"]["memory"]["refusals"] == 0


def test_trials_that_are_not_finite_shorten_the_step(options: dict[str, Any]) -> None:
    """The logarithm ends at zero: f is infinite or nan beyond."""
    if isinstance(options.get("curvature"), FisherCurvature):
        pytest.skip("the loss is no likelihood")
    w = nn.Parameter(torch.full((2,), 5.0, dtype=torch.float64))
    optimizer = NewtonKrylov([w], **options)
    loss = lambda: (w - 0.01 * w.log()).sum()
    for _ in range(40):
        optimizer.step(loss)
        assert bool((w > 0).all())
        assert bool(w.isfinite().all())
        if optimizer.last_step.outcome is StepOutcome.CONVERGED:
            break
    assert float(loss().detach()) < 1


class Interrupt(KeyboardInterrupt):
    pass


def test_an_interrupt_loses_nothing(options: dict[str, Any], usual: Usual) -> None:
    """Interrupted in the first or second evaluation of a step and taken again, the run is the uninterrupted one."""
    torch.manual_seed(1)
    model = net()
    optimizer = NewtonKrylov(model.parameters(), **options)
    records = []
    for index in range(3):
        for at, late in ((1, True), (2, False)):
            _interrupted_step(model, optimizer, index, at, late)
        records += run(model, optimizer, range(index, index + 1))
    assert identical(everything(model), usual.models[3])
    assert equal_records(records, usual.records[:3])


def _interrupted_step(model: nn.Module, optimizer: NewtonKrylov, index: int, at: int, late: bool) -> None:
    good, calls = lbfgs_form(optimizer, closure_of(model, index % 3)), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at and not late:
            raise Interrupt
        loss = good()
        if calls == at:
            raise Interrupt
        return loss

    before = everything(model), [p.grad for p in model.parameters()], copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    last, cost = optimizer.last_step, optimizer.cost
    try:
        optimizer.step(closure)
    except Interrupt:
        assert optimizer.last_step is last
        assert optimizer.cost == cost
    else:  # the step needed fewer evaluations: take it back by hand
        model.load_state_dict(dict(zip(model.state_dict(), before[0], strict=True)))
        optimizer.load_state_dict(before[2])
        optimizer.last_step, optimizer.cost = last, cost
        torch.set_rng_state(rng)
        return
    assert identical(everything(model), before[0])
    assert all(p.grad is g for p, g in zip(model.parameters(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("index", range(3))
def test_a_rejected_step_restores_bit_for_bit(options: dict[str, Any], index: int) -> None:
    """A loss that jumps up as soon as the parameters move cannot be lowered."""
    if isinstance(options.get("step"), FixedStep):
        pytest.skip("a fixed step accepts whatever is finite")
    model = net()
    start = [p.detach().clone() for p in model.parameters()]
    inner = closure_of(model, index)

    def trap() -> Tensor:
        moved = any(not torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))
        return inner() + 10.0 * moved

    optimizer = NewtonKrylov(model.parameters(), **options)
    before = everything(model)
    loss = optimizer.step(trap)
    record = optimizer.last_step
    assert record.outcome is StepOutcome.REJECTED
    assert identical(everything(model), before)
    assert record.new_loss == record.loss == pytest.approx(float(loss) + record.penalty, rel=1e-12)
    assert record.trials == 12
    spent = record.cost.losses + record.cost.gradients + record.cost.linearisations
    chooses = getattr(options.get("solver"), "backtracking", None) is not None  # among iterates, by losses of its own
    assert spent >= 16 if chooses else spent == 14  # the first step looks twice at its start


def test_running_statistics_move_once_per_accepted_step(options: dict[str, Any]) -> None:
    model = net()
    optimizer = NewtonKrylov(model.parameters(), **options)
    for index in range(5):
        expected = copy.deepcopy(model)
        rng = torch.get_rng_state()
        closure_of(expected, index)()
        after_one = torch.get_rng_state()
        torch.set_rng_state(rng)
        before = everything(model.norm)[2:]
        optimizer.step(closure_of(model, index))
        accepted = optimizer.last_step.accepted
        wanted = everything(expected.norm)[2:] if accepted else before
        for buffer, value in zip(everything(model.norm)[2:], wanted, strict=True):
            torch.testing.assert_close(buffer, value, rtol=1e-13, atol=0)
        assert torch.equal(torch.get_rng_state(), after_one)
