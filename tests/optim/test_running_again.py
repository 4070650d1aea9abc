"""Trials of least squares that run the first evaluation again as a list of operators, beside the closure itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from optim_cases import F64, normal
from torch import Tensor, nn

from imstep import pde
from imstep.curvature import course as courses
from imstep.curvature import writing_out
from imstep.curvature.course import PROBATION, KnownCourses
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.recording import Recording
from imstep.curvature.squares import require_residuals
from imstep.curvature.writing_out import Evaluation
from imstep.optim import LeastSquares

Closure = Callable[[], Tensor]


def network(*sizes: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        return nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())][:-1]).to(F64)


def slope(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def transport(model: nn.Module) -> Closure:
    def closure() -> Tensor:
        x = torch.rand(20, 2, dtype=F64).requires_grad_()
        start = torch.rand(5, 2, dtype=F64)
        d = slope(model(x), x)
        return (d[:, 1] + 3 * d[:, 0]).square().mean() + (model(start) - start[:, :1].sin()).square().mean()

    return closure


def laplace(model: nn.Module) -> Closure:
    def closure() -> Tensor:
        x = torch.rand(20, 2, dtype=F64)
        return (pde.laplacian(model, x) + x.prod(1, keepdim=True)).square().mean()

    return closure


def in_place(model: nn.Module) -> Closure:
    def closure() -> Tensor:
        u = model(torch.rand(20, 2, dtype=F64))
        u = u.mul_(2).add_(1)
        parts = torch.stack([u[:10], u[10:]], 1)
        parts[:, 0].sub_(0.5)
        return parts[torch.arange(9, -1, -1)].pow(2).sum() / 7

    return closure


def batched(model: nn.Module) -> Closure:
    slopes = torch.func.vmap(torch.func.grad(lambda p: model(p[None])[0, 0]))
    return lambda: slopes(torch.rand(20, 2, dtype=F64)).square().sum()


def bent(model: nn.Module) -> Closure:
    """By forward mode over reverse mode, which asks for the shapes of tangents that are zero."""
    features = lambda p: torch.cat([p.sin(), model(p) * (1 - model[0].bias[:1])])
    bends = torch.func.vmap(torch.func.hessian(lambda p: features(p).square().sum()))
    return lambda: bends(torch.rand(9, 2, dtype=F64)).square().mean()


def weighted(model: nn.Module) -> Closure:
    """With weights that depend on the parameters, though no derivative does."""

    def closure() -> Tensor:
        missed = model(torch.rand(20, 2, dtype=F64)) - 1
        return (torch.exp(-missed.detach().square().cumsum(0)) * missed).square().mean()

    return closure


def evaluation(
    closure: Closure, model: nn.Module, known: KnownOwners | None = None
) -> tuple[Evaluation, FrozenClosure]:
    vector = ParameterVector(model)
    frozen = FrozenClosure(closure, vector)
    return Evaluation.of(frozen, vector, known or KnownOwners()), frozen


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for at, p in enumerate(model.parameters()):
            p += 0.3 * normal(*p.shape, seed=at)


@pytest.mark.parametrize("make", [transport, laplace, in_place, batched, bent, weighted], ids=lambda f: f.__name__)
def test_comes_to_what_the_closure_does(make: Callable[[nn.Module], Closure]) -> None:
    model = network(2, 6, 5, 1)
    known = KnownOwners()
    at, frozen = evaluation(make(model), model, known)
    assert not any("_imstep_slot" in key for p in model.parameters() for key in p.untyped_storage().__dict__)
    before = torch.random.get_rng_state()
    for _ in range(2):
        moved(model)
        again = at.course.again()
        assert again is not None
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(again, require_residuals(frozen.loss_with_graph()).values)
        torch.random.set_rng_state(before)


def by_number(model: nn.Module) -> Closure:
    return lambda: (model(normal(9, 2)) - (1.0 if model(normal(1, 2)).item() > 0 else 2.0)).square().sum()


def by_length(model: nn.Module) -> Closure:
    return lambda: (lambda u: u[u.detach() > 0].square().sum() + 2 * u[u.detach() <= 0].square().sum())(
        model(normal(9, 2))
    )


def by_numpy(model: nn.Module) -> Closure:
    return lambda: (model(normal(9, 2)) - model[0].weight.detach().numpy().max()).square().sum()


def by_list(model: nn.Module) -> Closure:
    return lambda: (model(normal(9, 2)) - model[0].bias.tolist()[0]).square().sum()


def by_chance(model: nn.Module) -> Closure:
    return lambda: nn.functional.dropout(model(normal(9, 2)), 0.5).square().sum()


def by_constants(model: nn.Module) -> Closure:
    def closure() -> Tensor:
        table = torch.zeros(9, 2, dtype=F64)
        table[:, :1] = model(normal(9, 2))
        return table.square().sum()

    return closure


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network(2, 3, 1)
        self.register_buffer("largest", torch.zeros((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        u = self.inner(x)
        self.largest.copy_(u.detach().abs().max())
        return u


class Own(torch.autograd.Function):
    """Looks at numbers in a backward pass of the user's, where no mode sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 2 * x + float(x.detach().numpy().max())


def by_function(model: nn.Module) -> Closure:
    def closure() -> Tensor:
        x = normal(9, 2).requires_grad_()
        return slope(Own.apply(model(x)), x).square().sum()

    return closure


@pytest.mark.parametrize(
    "make", [by_number, by_numpy, by_list, by_chance, by_constants, by_function], ids=lambda f: f.__name__
)
def test_does_not_run_again_what_may_go_another_way(make: Callable[[nn.Module], Closure]) -> None:
    model = network(2, 3, 1)
    assert evaluation(make(model), model)[0].course.again() is None


def test_does_not_run_again_what_writes_to_buffers_or_comes_out_in_another_form() -> None:
    model: nn.Module = Written()
    assert evaluation(lambda: model(normal(9, 2)).square().sum(), model)[0].course.again() is None
    model = network(2, 3, 1)
    course = evaluation(by_length(model), model)[0].course
    with torch.no_grad():
        model[2].bias += 100
    assert course.again() is None


def test_does_not_run_again_with_overwritten_constants() -> None:
    model, x = network(2, 3, 1), normal(9, 2)
    course = evaluation(lambda: model(x).square().sum(), model)[0].course
    assert course.again() is not None
    x.add_(1)
    assert course.again() is None


def trained(
    make: Callable[[nn.Module], Closure], steps: int, resume: int | None = None
) -> tuple[nn.Module, LeastSquares, int]:
    """A model after some steps, and how often the closure was called."""
    torch.manual_seed(0)
    model, calls = network(2, 6, 1), 0
    inner = make(model)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return inner()

    optimizer = LeastSquares(model.parameters())
    for step in range(steps):
        if step == resume:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = LeastSquares(model.parameters())
            optimizer.load_state_dict(state)
        optimizer.step(closure)
    return model, optimizer, calls


def parameters_of(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def recurrent(model: nn.Module) -> Closure:
    """So many uses of each parameter that columns of J are made by forward products."""
    given, cut = normal(3, 10), lambda u: u.detach().square().mean()

    def closure() -> Tensor:
        state, seen = given.new_zeros(3, 1), []
        for u in given.unbind(1):
            state = 0.3 * model(torch.cat([state, u[:, None]], 1)) + 0.5 * state
            seen.append(state / (1 + cut(state)))
        return (torch.stack(seen, 1)[..., 0] - torch.rand_like(given)).square().mean()

    return closure


def nothing_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courses, "PROBATION", 10**9)
    monkeypatch.setattr(courses.KnownCourses, "recording", lambda known, parameters: Recording(parameters))
    monkeypatch.setattr(writing_out, "patterns_of", lambda inputs: None)


@pytest.mark.parametrize("make", [transport, laplace], ids=lambda f: f.__name__)
def test_steps_are_the_same_bit_for_bit(make: Callable[[nn.Module], Closure], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courses, "PROBATION", 3)
    steps = 8
    model, optimizer, calls = trained(make, steps)
    assert calls < optimizer.cost.losses
    resumed, other, _ = trained(make, steps, resume=5)
    assert torch.equal(parameters_of(model), parameters_of(resumed))
    assert optimizer.cost == other.cost
    nothing_foreseen(monkeypatch)
    plain, reference, calls = trained(make, steps)
    assert calls == reference.cost.losses >= optimizer.cost.losses
    assert torch.equal(parameters_of(model), parameters_of(plain))
    assert optimizer.cost.jacobian_passes < reference.cost.jacobian_passes


def test_columns_by_forward_products_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courses, "PROBATION", 2)
    model, optimizer, calls = trained(recurrent, 5)
    assert optimizer._owners.recorded
    assert calls < optimizer.cost.losses
    nothing_foreseen(monkeypatch)
    plain, reference, calls = trained(recurrent, 5)
    assert calls == reference.cost.losses
    assert torch.equal(parameters_of(model), parameters_of(plain))


def test_what_is_out_of_sight_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a parameter that the closure reads without PyTorch."""

    def hidden(model: nn.Module) -> Closure:
        memory, x = model[0].weight.detach().numpy(), normal(9, 2)
        return lambda: (model(x) - float(memory.max())).square().sum()

    monkeypatch.setattr(courses, "PROBATION", 2)
    _, optimizer, calls = trained(hidden, 5)
    assert calls == optimizer.cost.losses


def test_another_course_is_on_probation_again() -> None:
    model, known, x = network(2, 3, 1), KnownOwners(), normal(9, 2)
    one, other = (lambda: model(x).square().sum()), (lambda: model(x).sin().square().sum())
    for closure, trusted in [*[(one, False)] * PROBATION, (one, True), (other, False), (one, False)]:
        at, frozen = evaluation(closure, model, known)
        assert at.course.trusted == trusted
        at.course.compare(at.course.again(), require_residuals(frozen.loss_with_graph()).values)


def test_rows_are_checked_again_where_constants_say_otherwise() -> None:
    model, known = network(2, 3, 1), KnownOwners()

    def known_after(factor: Tensor, act: Callable[[Tensor], Tensor] = torch.sin) -> bool:
        course = evaluation(lambda: act(model(normal(4, 2)) * factor).square().sum(), model, known)[0].course
        found = course.has_known_rows
        course.know_rows()
        return found

    factor = torch.ones(4, 1, dtype=F64)
    assert [known_after(factor * (2 + at)) for at in range(PROBATION + 1)] == [False] * PROBATION + [True]
    factor[1] = 0
    assert not known_after(factor)  # which residual depends on what may have changed
    assert not any(known_after(factor, torch.relu) for _ in range(PROBATION + 2))
    known.courses.load_state_dict(KnownCourses().state_dict())
    assert not known_after(factor)


Changing = Callable[[nn.Module, int], Tensor]
"""A loss that is another one in every third evaluation."""


def odd(number: int) -> bool:
    return number % 3 == 2


CHANGING: dict[str, Changing] = {
    "nothing": lambda model, at: (model(normal(6, 2, seed=at)) - normal(6, 1, seed=at)).square().mean(),
    "points": lambda model, at: model(normal(6 + odd(at), 2, seed=at)).square().sum(),
    "factor": lambda model, at: ((3 if odd(at) else 2) * model(normal(6, 2))).square().sum(),
    "kind of a number": lambda model, at: (model(normal(6, 2)) * (2.0 if odd(at) else 2)).square().sum(),
    "branch": lambda model, at: (torch.sin if odd(at) else torch.tanh)(model(normal(6, 2))).square().sum(),
    "detached": lambda model, at: (lambda u: (u * (u.detach() if odd(at) else u)).square().sum())(model(normal(6, 2))),
    "dtype": lambda model, at: (model(normal(6, 2)) * normal(6, 1).to([F64, torch.float32][odd(at)])).square().sum(),
    "strides": lambda model, at: (normal(5, 6, 2) @ model[0].weight.mT).square().sum()
    + (normal(2, 6).mT if odd(at) else normal(6, 2)).mul(model[0].weight[0]).square().sum(),
    "zeros": lambda model, at: (model(normal(6, 2)) * (normal(6, 1) > (0 if odd(at) else -9))).square().sum(),
    "zero": lambda model, at: (model(normal(6, 2)) * torch.tensor(0.0 if odd(at) else 1.0, dtype=F64)).square().sum(),
    "chance": lambda model, at: nn.functional.dropout(model(normal(6, 2)), 0.5, training=odd(at)).square().sum(),
    "in place": lambda model, at: (lambda u: (u.mul_(2) if odd(at) else u.mul(2)).square().sum())(model(normal(6, 2))),
    "order": lambda model, at: torch.cat([model[0].bias, model[2].bias][:: -1 if odd(at) else 1]).square().sum(),
    "number": lambda model, at: torch.cat([model[0].bias] * (3 if odd(at) else 2)).square().sum(),
    "window": lambda model, at: (lambda u: (u[1:] if odd(at) else u[:-1]).square().sum())(model(normal(6, 2))),
    "indices": lambda model, at: model(normal(6, 2))[torch.tensor([0, 2, 5 if odd(at) else 4])].square().sum(),
    "keyword": lambda model, at: torch.add(model[0].bias, model[0].bias.sin(), alpha=2 + odd(at)).square().sum(),
    "part": lambda model, at: model(normal(6, 2)).square().sum() + (model[2].bias.square().sum() if odd(at) else 0),
    "end": lambda model, at: (lambda u: u.square().sum() + (0 if odd(at) else u.sin().square().sum()))(
        model(normal(6, 2))
    ),
    "slots": lambda model, at: (lambda u, v: (u - 2 * v if odd(at) else v - 2 * u).square().sum())(
        model(normal(6, 2)), model(normal(6, 2, seed=1))
    ),
    "number read": lambda model, at: (model(normal(6, 2)) * (model[2].bias.item() if odd(at) else 1)).square().sum(),
    "inference": lambda model, at: (lambda x: (model(normal(6, 2)) - x).square().sum())(
        torch.inference_mode(odd(at))(lambda: normal(6, 1))()
    ),
}


@pytest.mark.parametrize("what", CHANGING)
def test_a_recording_held_against_another_is_what_one_made_anew_is(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(2, 3, 1)
    held, anew = KnownOwners(), KnownOwners()
    repeated = []
    for number in range(7):
        closure = lambda at=number: CHANGING[what](model, at)
        with monkeypatch.context() as patched:
            patched.setattr(courses.KnownCourses, "recording", lambda known, parameters: Recording(parameters))
            torch.manual_seed(number)
            expected, _ = evaluation(closure, model, anew)
        torch.manual_seed(number)
        at, _ = evaluation(closure, model, held)
        assert held.courses.state_dict() == anew.courses.state_dict()
        assert torch.equal(at.residuals.values, expected.residuals.values)
        repeated.append(held.courses.outline is not None)
        moved(model)
        runs = [course.again() for course in (at.course, expected.course)]
        assert (runs[0] is None) == (runs[1] is None)
        assert runs[0] is None or torch.equal(*runs)
        for course, again in zip((at.course, expected.course), runs, strict=True):
            course.compare(again, require_residuals(closure()).whole)
            course.know_rows()
    assert repeated[1]
