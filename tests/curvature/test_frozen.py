"""A frozen closure: one batch for all evaluations of a step, whatever the closure draws, overwrites or raises."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, normal
from torch import Tensor, nn

from imstep.complexstep import UnsupportedOperatorError
from imstep.curvature import FrozenClosure, Hessian, ParameterVector
from imstep.curvature.hessian import gauss_newton_of, hessian_of

X, Y = normal(8, 4), normal(8, 3, seed=1)


@pytest.fixture(autouse=True)
def _seeded():
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def every_evaluation(frozen: FrozenClosure, parameters: ParameterVector) -> list[float]:
    """The loss as each kind of evaluation sees it; gradients and products must agree with each other."""
    point = frozen.linearise()
    v = normal(parameters.size, seed=9)
    again, gradient = frozen.gradient()
    trial = frozen.loss()
    torch.testing.assert_close(gradient, point.gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(frozen.product(v), hessian_of(point, parameters) @ v, rtol=1e-11, atol=1e-11)
    twice = frozen.linearise()
    assert torch.equal(twice.gradient, point.gradient)
    return [float(point.loss), float(again), float(trial), float(twice.loss)]


def by_torch() -> Tensor:
    return F.dropout(X, 0.5) + 0.1 * torch.randn(X.shape, dtype=F64)


def by_numpy() -> Tensor:
    return X + torch.from_numpy(np.random.standard_normal(X.shape))


def by_python() -> Tensor:
    return X[random.sample(range(8), 8)]


@pytest.mark.parametrize("draw", [by_torch, by_numpy, by_python])
def test_random_numbers_are_drawn_once(draw: Callable[[], Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)).double()
    parameters = ParameterVector(model)
    closure = lambda: F.mse_loss(model(draw()), Y)
    start = state()
    expected = float(closure().detach())
    after_one = state()
    assert after_one != start
    _restore(start)
    frozen = FrozenClosure(closure, parameters)
    losses = every_evaluation(frozen, parameters)
    assert losses == pytest.approx([expected] * 4, rel=1e-14)
    frozen.leave(accepted=True)
    assert state() == after_one
    assert float(closure().detach()) != pytest.approx(expected, rel=1e-3)  # the next batch is another one


def _restore(saved: tuple[Any, ...]) -> None:
    random.setstate(saved[0])
    kind = np.random.get_state()
    np.random.set_state((kind[0], np.array(saved[1], dtype=np.uint32), 624, 0, 0.0))
    torch.set_rng_state(torch.tensor(saved[2], dtype=torch.uint8))


def test_dropout_behind_attention_draws_the_same_mask_in_every_evaluation() -> None:
    """Masks are drawn in the order of memory, and fused attention orders its output as its queries are."""
    w = nn.Parameter(torch.randn(2, 4, 3, 8, dtype=torch.float64))

    def closure() -> Tensor:
        heads = w.transpose(1, 2)
        return F.dropout(F.scaled_dot_product_attention(heads, heads, heads), 0.5).square().mean()

    frozen = FrozenClosure(closure, ParameterVector([w]))
    at = frozen.linearise()
    torch.testing.assert_close(frozen.loss(), at.loss, rtol=1e-13, atol=0)
    loss, gradient = frozen.gradient()
    torch.testing.assert_close(loss, at.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, at.gradient, rtol=1e-10, atol=1e-14)


def test_next_batch_is_another_also_after_rejection() -> None:
    model = nn.Linear(4, 3).double()
    frozen = FrozenClosure(lambda: F.mse_loss(model(by_torch()), Y), ParameterVector(model))
    before = state()
    frozen.linearise()
    frozen.loss()
    frozen.leave(accepted=False)
    assert state() != before


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()


def spectral() -> nn.Module:
    hidden = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    return nn.Sequential(hidden, nn.Tanh(), nn.Linear(5, 3)).double()


class _Counting(nn.Module):
    """Buffers of its own, overwritten in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("table", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        with torch.no_grad():
            self.calls += 1
            self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
            self.table[self.calls % 2] = y[0]
        return y + 0.01 * self.average.sum()


class _Assigning(_Counting):
    """The same, where new tensors take the place of the old ones."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        with torch.no_grad():
            self.calls = self.calls + 1
            self.average.mul_(0.5)
            self.average = 0.9 * self.average + 0.1 * y.mean(0)
            self.table = torch.stack([self.table[1], y[0]])
        return y + 0.01 * self.average.sum()


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def same(model: nn.Module, expected: list[Tensor]) -> bool:
    return all(torch.equal(b, e) for b, e in zip(model.buffers(), expected, strict=True))


@pytest.mark.parametrize("make", [normalised, spectral, lambda: _Counting().double(), lambda: _Assigning().double()])
@pytest.mark.parametrize("accepted", [True, False])
def test_buffers_change_once_or_not_at_all(make: Callable[[], nn.Module], accepted: bool) -> None:
    model = make()
    model(X)  # away from the initial values
    parameters = ParameterVector(model)
    closure = lambda: F.mse_loss(model(X), Y)
    before = buffers(model)
    expected = float(closure().detach())
    after_one = buffers(model)
    assert not same(model, before)
    for b, saved in zip(model.buffers(), before, strict=True):
        b.copy_(saved)
    frozen = FrozenClosure(closure, parameters)
    snapshot = parameters.snapshot()
    losses = every_evaluation(frozen, parameters)
    assert losses == pytest.approx([expected] * 4, rel=1e-13)
    parameters.move(snapshot, torch.ones(parameters.size, dtype=F64), 0.5)
    frozen.loss()
    frozen.leave(accepted)
    expected_buffers = after_one if accepted else before
    for b, e in zip(model.buffers(), expected_buffers, strict=True):
        torch.testing.assert_close(b, e, rtol=1e-14, atol=0)
    if not accepted:
        assert same(model, before)


def test_batch_norm_counts_one_batch() -> None:
    model = normalised()
    frozen = FrozenClosure(lambda: F.mse_loss(model(X), Y), ParameterVector(model))
    for _ in range(3):
        frozen.linearise()
        frozen.loss()
    frozen.leave(accepted=True)
    assert model[1].num_batches_tracked == 1


def test_statistics_do_not_move_in_evaluation_mode() -> None:
    model = normalised().eval()
    before = buffers(model)
    frozen = FrozenClosure(lambda: F.mse_loss(model(X), Y), ParameterVector(model))
    frozen.linearise()
    frozen.leave(accepted=True)
    assert same(model, before)


def test_spectral_norm_against_double_backward() -> None:
    model = spectral().eval()  # power iterations fixed: the same function for both
    H = Hessian(lambda: F.mse_loss(model(X), Y), model)
    v = normal(H.size, seed=2)
    params = list(model.parameters())
    gradient = torch.autograd.grad(F.mse_loss(model(X), Y), params, create_graph=True)
    flat = lambda ts: torch.cat([t.reshape(-1) for t in ts])
    expected = flat(torch.autograd.grad(flat(gradient) @ v, params))
    torch.testing.assert_close(H @ v, expected, rtol=1e-11, atol=1e-12)


def test_counts_evaluations() -> None:
    model = nn.Linear(4, 3).double()
    calls = []
    frozen = FrozenClosure(lambda: calls.append(1) or F.mse_loss(model(X), Y), ParameterVector(model))
    frozen.linearise()
    frozen.gradient()
    frozen.loss()
    frozen.loss()
    assert (frozen.gradients, frozen.losses, len(calls)) == (2, 2, 4)


def test_trial_losses_skip_backward() -> None:
    model = nn.Linear(4, 3).double()
    backward = []
    model.weight.register_hook(lambda g: backward.append(1))

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        float(sum(p.grad.norm() for p in model.parameters()))  # a closure may look at its gradients
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        return loss

    model.weight.grad = kept = torch.ones(3, 4, dtype=F64)
    frozen = FrozenClosure(closure, ParameterVector(model))
    frozen.linearise()
    assert len(backward) == 1
    frozen.loss()
    assert len(backward) == 1
    assert model.weight.grad is kept
    assert bool((kept == 1).all())
    assert model.bias.grad is None


@pytest.mark.filterwarnings("ignore:Using backward")
def test_penalty_on_gradients_through_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def closure() -> Tensor:
        x = X.clone().requires_grad_()
        model(x).sum().backward(create_graph=True, inputs=[x])
        return (x.grad**2).mean()

    frozen = FrozenClosure(closure, ParameterVector(model))
    assert float(frozen.linearise().loss) == pytest.approx(float(frozen.loss()), rel=1e-14)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("late", [True, False])
def test_a_closure_that_raises_loses_nothing(call: int, late: bool) -> None:
    model = nn.Sequential(normalised(), nn.Dropout(0.5))
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        model.zero_grad()
        loss = F.mse_loss(model(X), Y)
        if calls == call and not late:
            raise Interrupted
        loss.backward()
        if calls == call:
            raise Interrupted
        return loss

    parameters = ParameterVector(model)
    for p in parameters.tensors:
        p.grad = torch.ones_like(p)
    before = parameters.snapshot(), buffers(model), [p.grad for p in parameters.tensors], state()
    frozen = FrozenClosure(closure, parameters)
    with pytest.raises(Interrupted):
        every_evaluation(frozen, parameters)
    frozen.undo()
    assert all(torch.equal(p, saved) for p, saved in zip(parameters.tensors, before[0], strict=True))
    assert same(model, before[1])
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(parameters.tensors, before[2], strict=True))
    assert state() == before[3]
    assert torch.is_grad_enabled()
    calls = 10
    assert float(FrozenClosure(closure, parameters).linearise().loss) > 0  # nothing is left switched


# --- what a closure must not return ----------------------------------------------------------------------------


def build(result: Callable[[Tensor], Any]) -> Hessian:
    layer = nn.Linear(4, 3).double()
    return Hessian(lambda: result(layer(X)), layer)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda z: z, ["shape (8, 3)", ".mean()"]),
        (lambda z: z.sum(0, keepdim=True), ["shape (1, 3)"]),
        (lambda z: float(z.sum()), ["'float'", "tensor with one entry"]),
        (lambda z: None, ["'NoneType'"]),
        (lambda z: (z.sum(), z), ["'tuple'"]),
        (lambda z: z.sum().detach(), ["without a graph", "loss.detach()"]),
        (lambda z: torch.tensor(float(z.sum())), ["without a graph"]),
        (lambda z: (z * 1j).sum(), ["complex128", ".abs()"]),
        (lambda z: z.sum().long(), ["int64", "no derivative", "rounded"]),
        (lambda z: (X.clone().requires_grad_() ** 2).sum(), ["none of the parameters"]),
    ],
)
def test_unusable_losses(result: Callable[[Tensor], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        build(result)
    assert all(word in str(raised.value) for word in words)


def test_loss_under_no_grad() -> None:
    layer = nn.Linear(4, 3).double()

    @torch.no_grad()
    def closure() -> Tensor:
        return layer(X).sum()

    with pytest.raises(ValueError, match="no_grad"):
        Hessian(closure, layer)


def test_sparse_gradients() -> None:
    table = nn.Embedding(5, 2, sparse=True)

    def closure() -> Tensor:
        loss = (table(torch.tensor([1, 2])) ** 2).sum()
        loss.backward()
        return loss

    for f in (closure, lambda: (table(torch.tensor([1, 2])) ** 2).sum()):
        with pytest.raises((ValueError, UnsupportedOperatorError), match=r"sparse=False"):
            Hessian(f, table)


def test_one_entry_of_any_shape_will_do() -> None:
    assert build(lambda z: (z**2).sum().reshape(1, 1)).loss.shape == ()


def test_gradients_enabled_inside_also_from_no_grad() -> None:
    with torch.no_grad():
        H = build(lambda z: (z**2).sum())
    assert H.gradient.norm() > 0


def test_gauss_newton_and_hessian_of_one_point_agree_where_the_model_is_linear() -> None:
    layer = nn.Linear(4, 3).double()
    parameters = ParameterVector(layer)
    point = FrozenClosure(lambda: F.cross_entropy(layer(X), torch.arange(8) % 3), parameters).linearise()
    approximation = gauss_newton_of(point, parameters)
    assert approximation is not None
    torch.testing.assert_close(
        approximation.to_dense(), hessian_of(point, parameters).to_dense(), rtol=1e-13, atol=1e-15
    )
