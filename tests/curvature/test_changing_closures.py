"""Closures that are another function each time: what is put back, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, normal
from torch import Tensor, nn
from torch.nn.utils import parametrize

from imstep import LeastSquares, NewtonKrylov, methods
from imstep.curvature import FrozenClosure, GaussNewton, Hessian, ParameterVector, StaleLossError

X, Y = normal(8, 4), normal(8, 3, seed=1)


def test_codes_that_move_by_themselves_move_once_a_step() -> None:
    """Parameters that are not trained, as of a vector quantisation by means."""
    model = nn.Linear(4, 3).double()
    model.codes = nn.Parameter(torch.zeros(3, dtype=F64), requires_grad=False)

    def closure() -> Tensor:
        y = model(X)
        model.codes = nn.Parameter(0.9 * model.codes + y.detach().mean(0), requires_grad=False)
        return F.mse_loss(y + model.codes, Y)

    optimizer, expected = NewtonKrylov(model.parameters()), model(X).detach().mean(0)
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    torch.testing.assert_close(model.codes.detach(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("make", [NewtonKrylov, NewtonKrylov.for_batches, methods.lbfgs, methods.soap, LeastSquares])
def test_a_teacher_that_moves_by_its_data_moves_once_a_step(make: Any) -> None:
    """As published programs of momentum contrast write it; at first it is the student, and nothing is seen of it."""
    student, teacher = nn.Linear(4, 3).double(), nn.Linear(4, 3).double().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())

    def closure() -> Tensor:
        with torch.no_grad():
            for q, k in zip(student.parameters(), teacher.parameters(), strict=True):
                k.data = k.data * 0.9 + q.data * 0.1
            target = teacher(X)
        return F.mse_loss(student(X), Y) + F.mse_loss(student(X), target)

    optimizer = make(student.parameters())
    expected = [p.clone() for p in teacher.parameters()]
    for _ in range(10):
        before = expected
        expected = [0.9 * k + 0.1 * q.detach() for k, q in zip(before, student.parameters(), strict=True)]
        loss = F.mse_loss(student(X), Y) + F.mse_loss(student(X), F.linear(X, *expected))
        assert float(optimizer.step(closure)) == pytest.approx(float(loss), rel=1e-12)
        expected = expected if optimizer.last_step.accepted else before
        for k, e in zip(teacher.parameters(), expected, strict=True):
            torch.testing.assert_close(k.detach(), e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("first", ["linearise", "watch"])
def test_a_sum_that_begins_in_the_closure_is_none_of_the_model_s(first: str) -> None:
    model = nn.Linear(4, 3).double()

    def closure() -> Tensor:
        total = torch.tensor(0.0, dtype=F64)
        total += F.mse_loss(model(X), Y)
        return total

    frozen, expected = FrozenClosure(closure, ParameterVector(model)), closure().detach()
    loss = frozen.linearise().loss if first == "linearise" else frozen.loss_with_graph(frozen.watch()).detach()
    frozen.loss()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("make", [NewtonKrylov, NewtonKrylov.for_batches, LeastSquares])
def test_a_generator_of_the_user_s_moves_once_a_step(make: Any) -> None:
    model, own = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(), torch.Generator().manual_seed(0)

    def closure() -> Tensor:
        x = torch.rand(5, 4, generator=own, dtype=F64)
        return (model(x).sum(1) - torch.empty(5, dtype=F64).normal_(generator=own)).square().mean()

    optimizer = make(model.parameters())
    for _ in range(3):
        before = own.get_state()
        closure()
        expected = own.get_state()
        own.set_state(before)
        optimizer.step(closure)
        assert torch.equal(own.get_state(), expected)


def test_parameters_that_are_replaced_are_refused() -> None:
    model = nn.Linear(4, 3).double()

    def closure() -> Tensor:
        loss = F.mse_loss(model(X), Y)
        model.bias = nn.Parameter(0.9 * model.bias.detach())
        return loss

    for optimizer in (NewtonKrylov(model.parameters()), LeastSquares(model.parameters())):
        with pytest.raises(ValueError, match="closure changed the parameters"):
            optimizer.step(closure)


BATCHES = [slice(0, 3), slice(2, 6), slice(4, 8)]


def _fetching() -> Callable[[], slice]:
    batches = itertools.cycle(BATCHES)
    return lambda: next(batches)


def _drawing() -> Callable[[], Tensor]:
    generator = np.random.default_rng(0)
    return lambda: torch.as_tensor(generator.permutation(len(X))[:5])


@pytest.mark.parametrize("make", [NewtonKrylov, NewtonKrylov.for_batches, LeastSquares, methods.lbfgs])
@pytest.mark.parametrize("source", [_fetching, _drawing])
@pytest.mark.parametrize("pieces", [False, True])
def test_a_closure_that_fetches_its_batch_is_refused(make: Any, source: Any, pieces: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    optimizer, batch, before = make(model.parameters()), source(), [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        chosen = batch()
        return F.mse_loss(model(X[chosen]), Y[chosen])

    with pytest.raises(ValueError, match=r"called again at the same parameters.*Fetch the batch"):
        optimizer.step([closure] if pieces else closure)
    assert all(torch.equal(p, saved) for p, saved in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("method", [methods.soap, methods.shampoo])
def test_one_evaluation_a_step_may_have_a_batch_of_its_own(method: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    optimizer, batch = method(model.parameters()), _fetching()

    def closure() -> Tensor:
        chosen = batch()
        return F.mse_loss(model(X[chosen]), Y[chosen])

    for _ in BATCHES:
        optimizer.step(closure)


def test_recomputed_products_are_of_one_function() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(), _fetching()

    def closure() -> Tensor:
        chosen = batch()
        return F.mse_loss(model(X[chosen]), Y[chosen])

    H = Hessian(closure, model, memory_budget=0)
    with pytest.raises(ValueError, match="called again at the same parameters"):
        H @ torch.ones(H.size, dtype=F64)


@pytest.mark.parametrize("factor", [1.001, 1.1])
def test_a_first_evaluation_of_another_function_is_refused(factor: float) -> None:
    model, calls = nn.Linear(4, 3).double(), itertools.count()
    frozen = FrozenClosure(lambda: F.mse_loss(model(X), Y) * (factor if next(calls) else 1), ParameterVector(model))
    frozen.doubt()
    with pytest.raises(ValueError, match="called again at the same parameters"):
        frozen.linearise()


@pytest.mark.parametrize("make", [NewtonKrylov, NewtonKrylov.for_batches, methods.hessian_free, methods.kfac])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_what_rounding_leaves_of_a_loss_is_no_other_function(kind: Any, make: Any) -> None:
    """A record has simpler operators in place of recurrent networks' kernels, and other roundings."""
    torch.manual_seed(0)
    model, x = kind(4, 24, batch_first=True), torch.randn(16, 10, 4)
    y = model(x)[0].detach() + 1e-7 * torch.randn(16, 10, 24)
    make(model.parameters()).step(lambda: F.mse_loss(model(x)[0], y))


class Scaled(nn.Module):
    """A model that divides by a running scale, which it overwrites or gives anew."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.layer, self.write = nn.Linear(4, 3).double(), write
        self.register_buffer("scale", torch.ones(3, dtype=F64))
        with torch.no_grad():
            self.layer.weight.copy_(normal(3, 4, seed=2))
            self.layer.bias.copy_(normal(3, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        with torch.no_grad():
            change = 0.1 * y.std(0)
            if self.write == "assigned":
                self.scale = 0.9 * self.scale + change
            elif self.write == "overwritten":
                self.scale.mul_(0.9).add_(change)
            elif self.write == "by detach":
                self.scale.detach().mul_(0.9)
                self.scale.detach().add_(change)
            elif self.write == "by data":
                self.scale.data.mul_(0.9).add_(change)
            else:
                for at in range(3):
                    self.scale[at].mul_(0.9).add_(change[at])
        return y / self.scale


WRITES = ["overwritten", "by detach", "by data", "by views"]
OPTIMIZERS = [NewtonKrylov, NewtonKrylov.for_batches, LeastSquares, methods.gauss_newton, methods.kfac, methods.lbfgs]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_buffers_that_are_overwritten_and_read(make: Any, write: str) -> None:
    """As buffers that are assigned, which leave what was recorded as it is."""

    def steps(write: str) -> tuple[list[float], Tensor]:
        model = Scaled(write)
        optimizer = make(model.parameters())
        losses = [float(optimizer.step(lambda: F.mse_loss(model(X), Y))) for _ in range(4)]
        assert optimizer.last_step.accepted
        return losses, model.scale

    (losses, scale), (expected, other) = steps(write), steps("assigned")
    assert losses == expected
    assert torch.equal(scale, other)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_weights_that_are_overwritten_and_read(make: Any) -> None:
    def steps(overwrites: bool) -> list[float]:
        torch.manual_seed(0)
        model, kept = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.ones(8, 3, dtype=F64)

        def closure() -> Tensor:
            r = model(X) - Y
            weights = torch.exp(-r.detach().abs())
            return ((kept.copy_(weights) if overwrites else weights) * r.square()).mean()

        optimizer = make(model.parameters())
        return [float(optimizer.step(closure)) for _ in range(4)]

    assert steps(True) == steps(False)


@pytest.mark.parametrize("write", WRITES)
def test_graphs_of_trials_read_what_they_have_read(write: str) -> None:
    model = Scaled(write)
    frozen = FrozenClosure(lambda: F.mse_loss(model(X), Y), ParameterVector(model))
    frozen.linearise()
    first, graphs = model.scale.clone(), []
    for _ in range(2):
        with torch.no_grad():
            model.layer.weight.mul_(1.1)
        with frozen.beside():
            loss = frozen.loss_with_graph()
            gradient = torch.autograd.grad(loss, model.layer.weight, retain_graph=True)[0]
            graphs.append((loss, gradient, frozen.state()))
        assert torch.equal(model.scale, first)
    for loss, gradient, state in graphs:
        with frozen.as_in(state):
            assert torch.equal(torch.autograd.grad(loss, model.layer.weight)[0], gradient)
        assert torch.equal(model.scale, first)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("operator", ["Hessian", "GaussNewton"])
@pytest.mark.parametrize("batches", [[X], [X[:3], X[3:]]], ids=["one", "two"])
def test_records_of_batches_whose_buffers_are_put_back(batches: list[Tensor], operator: str, write: str) -> None:
    def matrices(write: str) -> list[Tensor]:
        model = Scaled(write)
        if operator == "Hessian":
            A = Hessian.over(batches, lambda x: model(x).square().mean(), model)
        else:
            split = lambda x: (model(x), torch.zeros(len(x), 3, dtype=F64))
            A = GaussNewton.over(batches, split, model, loss=nn.MSELoss())
        assert bool((model.scale == 1).all())
        block = A.block([model.layer.weight])
        model(X[:2])
        return [A.to_dense(), block.to_dense()]

    for found, expected in zip(matrices(write), matrices("assigned"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


KEPT = {
    "a feature": lambda kept, model: kept.setdefault("z", model[0](X)),
    "a penalty": lambda kept, model: model[0](X) * (1 + kept.setdefault("p", model[0].weight.square().mean())),
    "an activation from a hook": lambda kept, model: (kept.setdefault("z", []).append(model[0](X)), kept["z"][0])[1],
}


@pytest.mark.parametrize("make", [NewtonKrylov, NewtonKrylov.for_batches, methods.lbfgs, LeastSquares])
@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_from_one_call_to_the_next_is_refused(make: Any, kind: str) -> None:
    """It is of this step, so that the first evaluation shows nothing."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    before, kept = [p.detach().clone() for p in model.parameters()], {}
    optimizer = make(model.parameters())
    with pytest.raises(StaleLossError, match="kept from one call to the next"):
        optimizer.step(lambda: F.mse_loss(model[1](KEPT[kind](kept, model)), Y))
    assert all(map(torch.equal, before, model.parameters()))


def test_weights_that_a_parametrization_keeps_are_refused() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).double())
    optimizer = NewtonKrylov(layer.parameters())
    with parametrize.cached(), pytest.raises(StaleLossError, match="inside the closure"):
        optimizer.step(lambda: F.mse_loss(layer(X), Y))

    def closure() -> Tensor:
        with parametrize.cached():
            return F.mse_loss(layer(X) + layer(-X).tanh(), Y)

    optimizer.step(closure)
    assert optimizer.last_step.accepted
    assert optimizer.last_step.new_loss == pytest.approx(float(closure().detach()), rel=1e-12)


def test_what_is_kept_without_a_derivative_is_a_constant() -> None:
    layer, other, kept = nn.Linear(4, 3).double(), nn.Linear(4, 3).double(), {}

    def closure() -> Tensor:
        target = kept.setdefault("target", layer(X).detach()) + kept.setdefault("other", other(X))
        return F.mse_loss(layer(X), Y) + F.mse_loss(layer(X), target)

    optimizer = NewtonKrylov(layer.parameters())
    optimizer.step(closure)
    assert optimizer.last_step.new_loss == pytest.approx(float(closure().detach()), rel=1e-12)
