"""A batch in pieces: the step on all of them together, with one at a time in memory."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from optim_cases import F64, LABELS, X, network, normal
from torch import Tensor, nn

from imstep import LeastSquares, MicroBatches, NewtonKrylov
from imstep.complexstep.loss_split import ConvexLoss
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.linearisation import Linearisation
from imstep.curvature.reduction import SumOverBatches
from imstep.globalization import (
    Armijo,
    ExactEstimate,
    LineModel,
    SearchState,
    StrongWolfe,
    TaylorMonitor,
    Trial,
    Verdict,
)
from imstep.linalg import NoiseTest
from imstep.optim import (
    ConjugateGradient,
    Cost,
    ExactHessian,
    FixedProducts,
    NoPreconditioning,
)

EXACT = {"forcing": FixedProducts(4), "preconditioning": NoPreconditioning()}
CUTS = (0, 7, 8, 20, len(X))


def pieces() -> list[tuple[Tensor, Tensor]]:
    """Uneven ones, one of a single example."""
    return [(X[a:b], LABELS[a:b]) for a, b in itertools.pairwise(CUTS)]


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(joined: bool, reduction: str = "mean", budget: int | None = 0, steps: int = 2, **options: object) -> Tensor:
    model = network()
    optimizer = NewtonKrylov(model.parameters(), **options)
    loss = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)
    kind = SumOverBatches() if reduction == "sum" else None
    for _ in range(steps):
        given = MicroBatches(loss, pieces(), reduction=kind, memory_budget=budget)
        optimizer.step((lambda: loss((X, LABELS))) if joined else given)
    return weights_of(model)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("budget", [0, 20_000])
def test_pieces_are_one_batch(reduction: str, budget: int | None) -> None:
    expected = trained(True, reduction, **EXACT)
    torch.testing.assert_close(trained(False, reduction, budget, **EXACT), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": ExactHessian(), "forcing": FixedProducts(3), "preconditioning": NoPreconditioning()},
        {"weight_decay": 0.1, **EXACT},
        {"momentum": True, "forcing": FixedProducts(3), "preconditioning": NoPreconditioning()},
        {"step": StrongWolfe(), **EXACT},
        {"step": TaylorMonitor(error=ExactEstimate()), **EXACT},
    ],
    ids=["Hessian", "weight decay", "momentum", "slopes of trials", "third derivatives"],
)
def test_strategies_see_one_batch(options: dict[str, object]) -> None:
    torch.testing.assert_close(trained(False, **options), trained(True, **options), rtol=1e-7, atol=1e-9)


def test_a_list_of_closures_adds_up() -> None:
    found = []
    for joined in (False, True):
        model = network()
        closures = [lambda x=x, y=y, m=model: F.cross_entropy(m(x), y) for x, y in pieces()]
        optimizer = NewtonKrylov(model.parameters(), **EXACT)
        loss = optimizer.step((lambda c=closures: sum(f() for f in c)) if joined else closures)
        found.append(torch.cat([loss[None], weights_of(model), *(p.grad.flatten() for p in model.parameters())]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_closures_may_call_backward() -> None:
    found = []
    for calls in (False, True):
        model = network()

        def loss(batch: tuple[Tensor, Tensor], model: nn.Module = model, calls: bool = calls) -> Tensor:
            model.zero_grad()
            value = F.cross_entropy(model(batch[0]), batch[1])
            if calls:
                value.backward()
            return value

        optimizer = NewtonKrylov(model.parameters(), **EXACT)
        found.append(optimizer.step(MicroBatches(loss, pieces()))[None])
        found.append(weights_of(model))
    torch.testing.assert_close(torch.cat(found[:2]), torch.cat(found[2:]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("make", [NewtonKrylov, NewtonKrylov.for_batches])
def test_kronecker_factors_are_those_of_the_whole(
    make: type[NewtonKrylov], budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The targets that factors are sampled from depend on how a batch is cut; here every example has its own."""

    def drawn(loss: Tensor, ends: list[ConvexLoss], generator: torch.Generator) -> list[Tensor]:
        return [end.z.detach().sin() / len(end.z) ** 0.5 for end in ends]

    monkeypatch.setattr("imstep.curvature.kronecker.sample_output_gradients", drawn)
    found = []
    for joined in (False, True):
        model = network()
        optimizer = make(model.parameters(), forcing=FixedProducts(3))
        loss = lambda batch, m=model: F.cross_entropy(m(batch[0]), batch[1])
        for _ in range(4):
            given = MicroBatches(loss, pieces(), memory_budget=budget)
            optimizer.step((lambda f=loss: f((X, LABELS))) if joined else given)
        found.append(weights_of(model))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


class Noisy(nn.Module):
    """Running statistics, a counter that only some pieces move, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4, dtype=F64), nn.Linear(4, 3, dtype=F64)
        self.register_buffer("shift", torch.zeros((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 5:
            self.shift += 0.1 * float(x.mean())
        return self.last(F.dropout(self.norm(x), 0.3)) + self.shift * torch.arange(3, dtype=F64)


@pytest.mark.parametrize("accepted", [True, False])
def test_pieces_see_the_noise_of_one_accumulation(accepted: bool) -> None:
    """As one closure that evaluates them one after the other, in its loss, its steps, its buffers and its numbers."""
    batches, found = [(x, y) for x, y in pieces() if len(x) > 1], []
    step = {} if accepted else {"step": Refusing(), "max_trials": 2}
    for joined in (False, True):
        torch.manual_seed(0)
        model = Noisy()
        optimizer = NewtonKrylov(model.parameters(), **EXACT, **step)
        given = MicroBatches(lambda b, m=model: F.cross_entropy(m(b[0]), b[1]), batches, memory_budget=0)
        for _ in range(3):
            optimizer.step((lambda g=given: g()) if joined else given)
            assert optimizer.last_step.accepted is accepted
        state = [t.double().flatten() for t in (*model.parameters(), *model.buffers())]
        found.append((torch.cat(state).detach(), torch.get_rng_state()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-8, atol=1e-10)
    assert torch.equal(found[0][1], found[1][1])


class Refusing(Armijo):
    """Accepts nothing."""

    def judge(self, state: SearchState, model: LineModel, trial: Trial) -> Verdict:
        return replace(super().judge(state, model, trial), accepted=False, step_length=trial.step_length / 2)


def test_a_failing_piece_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = Noisy()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    calls = itertools.count()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        if next(calls) == 6:  # in a product
            raise KeyboardInterrupt
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(KeyboardInterrupt):
        NewtonKrylov(model.parameters()).step(MicroBatches(loss, pieces()[2:], memory_budget=0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_part_that_gives_the_curvature_may_come_in_pieces() -> None:
    found = []
    for joined in (False, True):
        model = network()
        loss = lambda batch, m=model: F.cross_entropy(m(batch[0]), batch[1])
        part = MicroBatches(loss, pieces()[:3], memory_budget=0)
        optimizer = NewtonKrylov(model.parameters(), **EXACT)
        optimizer.step(MicroBatches(loss, pieces()), (lambda p=part: p()) if joined else part)
        found.append(weights_of(model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_costs_count_what_is_recorded_anew() -> None:
    kept, anew = (_cost(budget) for budget in (None, 0))
    assert kept.linearisations == 1
    assert anew.linearisations == 1 + anew.products == 1 + kept.products


def _cost(budget: int | None) -> Cost:
    model = network()
    optimizer = NewtonKrylov(model.parameters(), **EXACT)
    optimizer.step(MicroBatches(lambda b: F.cross_entropy(model(b[0]), b[1]), pieces(), memory_budget=budget))
    return optimizer.last_step.cost


def test_one_piece_at_a_time_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bytes of all records that are alive at once."""
    whole, in_pieces = _largest(1, monkeypatch), _largest(8, monkeypatch)
    assert whole > 5 * in_pieces


def _largest(pieces: int, monkeypatch: pytest.MonkeyPatch) -> int:
    model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3))
    x, y = normal(800, 4).float(), torch.arange(800) % 3
    sizes, largest, linearise = [], [], FrozenClosure.linearise

    def watched(*args: object, **options: object) -> Linearisation:
        at = linearise(*args, **options)
        sizes.append(at.tape.nbytes)
        weakref.finalize(at, sizes.remove, at.tape.nbytes)
        largest.append(sum(sizes))
        return at

    monkeypatch.setattr(FrozenClosure, "linearise", watched)
    optimizer = NewtonKrylov(model.parameters(), forcing=FixedProducts(2))
    batches = zip(x.chunk(pieces), y.chunk(pieces), strict=True)
    optimizer.step(MicroBatches(lambda b: F.cross_entropy(model(b[0]), b[1]), batches, memory_budget=0))
    monkeypatch.undo()
    return max(largest)


def test_the_variance_of_pieces_adds_up() -> None:
    loss = lambda batch, model: F.cross_entropy(model(batch[0]), batch[1])

    def variance(closure: Callable[[nn.Module], Callable[[], Tensor]]) -> float:
        model = network()
        optimizer = NewtonKrylov(model.parameters(), variance_every=1, forcing=FixedProducts(1))
        optimizer.step(closure(model))
        return optimizer.last_step.gradient_variance

    several = [b for b in pieces() if len(b[0]) > 1]
    n = sum(len(x) for x, _ in several)
    each = [(len(b[0]) / n) ** 2 * variance(lambda m, b=b: lambda: loss(b, m)) for b in several]
    whole = variance(lambda m: MicroBatches(lambda b: loss(b, m), several))
    assert whole == pytest.approx(sum(each), rel=1e-9)


def test_least_squares_takes_pieces_as_one_batch() -> None:
    found = []
    for joined in (False, True):
        model = network()
        loss = lambda batch, m=model: m(batch[0]).square().mean()
        optimizer = LeastSquares(model.parameters())
        optimizer.step((lambda f=loss: f((X, LABELS))) if joined else MicroBatches(loss, pieces()))
        found.append(weights_of(model))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_what_has_no_meaning_is_refused() -> None:
    model = network()
    loss = lambda batch: F.cross_entropy(model(batch[0]), batch[1])
    halved = NewtonKrylov(model.parameters(), solver=ConjugateGradient(noise=NoiseTest()))
    with pytest.raises(ValueError, match="at least one piece"):
        NewtonKrylov(model.parameters()).step([])
    with pytest.raises(TypeError, match="list of closures; it holds a tuple"):
        NewtonKrylov(model.parameters()).step(pieces())
    with pytest.raises(ValueError, match="Leave empty pieces out"):
        MicroBatches(loss, [*pieces(), (X[:0], LABELS[:0])])
    with pytest.raises(ValueError, match="comes in pieces"):
        halved.step(MicroBatches(loss, pieces()))
    calls = MicroBatches(lambda b: model(b[0]).square().mean().backward(), pieces())
    with pytest.raises(ValueError, match="leave backward"):
        LeastSquares(model.parameters()).step(calls)


def test_other_optimizers_take_it_as_a_closure() -> None:
    model = network()
    given = MicroBatches(lambda b: F.cross_entropy(model(b[0]), b[1]), iter(pieces()))
    assert float(given().detach()) == pytest.approx(float(F.cross_entropy(model(X), LABELS).detach()), rel=1e-12)
