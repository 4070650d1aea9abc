"""Evaluations of one structure: the backward pass of an earlier one is run as a list, or autograd makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import imstep
from imstep.complexstep.pattern import patterns_of
from imstep.curvature import frozen
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.state import NumpyState

Closure = Callable[[], Tensor]
FIRST = 2
"""The number of the first evaluation that can be run as a list: the one before it is noted."""


@contextmanager
def recorded_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A context in which nothing is foreseen."""
    with monkeypatch.context() as patched:
        patched.setattr(frozen, "patterns_of", lambda inputs: None)
        yield


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, Callable[[int], Closure], int], list[bool]]:
    """For each of several closures whether it was run as a list; all agree bit for bit with a record made anew."""

    def evaluate(closure: Closure, model: nn.Module, seed: int) -> tuple[list[Tensor], bool]:
        torch.manual_seed(seed)
        parameters = ParameterVector(model)
        batch = frozen.FrozenClosure(closure, parameters)
        at = batch.linearise()
        direction = torch.randn(parameters.size, generator=torch.Generator().manual_seed(seed), dtype=parameters.dtype)
        product = imstep.curvature.hessian.hessian_of(at, parameters) @ direction
        batch.leave(accepted=True)
        return [at.loss, at.gradient, product, torch.get_rng_state(), *(b.clone() for b in model.buffers())], at.static

    def run(model: nn.Module, closure_of: Callable[[int], Closure], count: int = 4) -> list[bool]:
        found = []
        for number in range(count):
            closure, buffers = closure_of(number), [b.clone() for b in model.buffers()]
            with recorded_anew(monkeypatch):
                expected, _ = evaluate(closure, model, number)
            for b, before in zip(model.buffers(), buffers, strict=True):
                b.copy_(before)
            values, was_static = evaluate(closure, model, number)
            assert all(map(torch.equal, values, expected))
            found.append(was_static)
        return found

    return run


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def classified(net: Callable[[Tensor], Tensor], *shape: int) -> Closure:
    """A loss on inputs drawn now, and labels drawn in it."""
    x = torch.randn(*(shape or (8, 6)))
    return lambda: F.cross_entropy(net(x), torch.randint(3, (len(x),)))


# --- what repeats itself ----------------------------------------------------------------------------------------------


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    return nn.Sequential(*first, nn.Conv2d(4, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(24, 3))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, activation="gelu")

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.layer(self.embedding(tokens), src_mask=mask, is_causal=True)
        return hidden @ self.embedding.weight.t()

    def closure(self, number: int) -> Closure:
        tokens = torch.randint(11, (3, 6))
        return lambda: F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(3, 5, num_layers=2, batch_first=True), nn.Linear(5, 1)

    def closure(self, number: int) -> Closure:
        x, y = torch.randn(4, 6, 3), torch.randn(4, 1)
        return lambda: F.mse_loss(self.head(self.layers(x)[0][:, -1]), y)


class Pinn(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.double()

    def closure(self, number: int) -> Closure:
        def loss() -> Tensor:
            x, edge = torch.rand(9, 2).double().requires_grad_(), torch.rand(4, 2).double()
            (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
            bends = [torch.autograd.grad(slope[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(2)]
            return (bends[0] + bends[1] + 1).square().mean() + 0.1 * self(edge).square().mean()

        return loss


def test_networks_repeat_themselves(static):
    """Records of later batches are those made anew, random numbers and buffers included."""
    repeats = [False, False, True, True]
    net, images = mlp(), cnn()
    assert static(net, lambda number: classified(net)) == repeats
    assert static(images, lambda number: classified(images, 5, 1, 8, 8)) == repeats
    for model in (Gpt(), Recurrent(), Pinn()):
        assert static(model, model.closure) == repeats


def test_products_are_those_of_double_backward():
    net = mlp().double()
    for _ in range(4):
        x, y = torch.randn(7, 6).double(), torch.randint(3, (7,))
        H = imstep.Hessian(lambda: F.cross_entropy(net(x), y), net)  # noqa: B023
        v = torch.randn(H.shape[0]).double()
        gradient = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()), create_graph=True)
        inner = torch.cat([g.reshape(-1) for g in gradient]) @ v
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(inner, list(net.parameters()))])
        assert torch.allclose(H @ v, expected, atol=1e-12)


def test_two_records_of_one_structure_are_independent():
    net = mlp()
    operators = []
    for number in range(5):
        x = torch.full((4, 6), float(number))
        operators.append(imstep.Hessian(lambda: net(x).square().mean(), net))  # noqa: B023
    v = torch.ones(operators[0].shape[0])
    again = imstep.Hessian(lambda: net(torch.full((4, 6), 2.0)).square().mean(), net)
    assert torch.equal(operators[2] @ v, again @ v)
    assert not torch.equal(operators[3] @ v, again @ v)


# --- what changes -----------------------------------------------------------------------------------------------------

CHANGED = range(3, 5)
"""Numbers of the evaluations that are another in some way."""


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Marked(Tensor):
    """A subclass of the user's."""


def hooked(h: Tensor) -> Tensor:
    h.register_hook(lambda g: 2 * g)
    return h


def hooked_by_its_node(h: Tensor) -> Tensor:
    h.grad_fn.register_prehook(lambda gradients: (2 * gradients[0],))
    return h


def without_graph(net: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net[0](x)


def saved_elsewhere(net: nn.Sequential, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return net[0](x)


HIDDEN = {
    "detached": lambda net, x: net[0](x).detach(),
    "without a graph": without_graph,
    "a hook on a tensor": lambda net, x: hooked(net[0](x)),
    "a hook on a node": lambda net, x: hooked_by_its_node(net[0](x)),
    "a Function": lambda net, x: Doubled.apply(net[0](x)),
    "hooks on what is saved": saved_elsewhere,
    "a subclass of Tensor": lambda net, x: net[0](x.as_subclass(Marked)),
    "another factor": lambda net, x: 2.0 * net[0](x),
    "a number that was read": lambda net, x: net[0](x) * float(net[0](x).sum().detach()),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_is_changed_between_steps_is_seen(static, kind):
    net = mlp()
    hidden = lambda number: HIDDEN[kind] if number in CHANGED else lambda net, x: 1.0 * net[0](x)

    def closure_of(number: int) -> Closure:
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        return lambda: F.cross_entropy(net[1:](hidden(number)(net, x)), y) + net[0](x).square().mean()

    found = static(net, closure_of, 5)
    assert found[FIRST]
    assert not found[CHANGED[0]]
    if kind not in ("another factor", "a number that was read"):  # whose second time may repeat the first
        assert not any(found[number] for number in CHANGED)


def test_numbers_are_compared_by_value(static):
    """Operators of one form that do something else: another dimension, power, sign of zero."""
    net, f = nn.Linear(4, 4), [lambda h: h.sum(0), lambda h: h.sum(1), lambda h: h[1], lambda h: h[:, 1]]
    for one, other in ((f[0], f[1]), (f[2], f[3])):
        x = torch.randn(4, 4)
        form = lambda number: one if number < 3 else other  # noqa: B023
        found = static(net, lambda number: lambda: form(number)(net(x)).pow(3).sum(), 5)  # noqa: B023
        assert not found[3]


def test_a_factor_that_changes_in_every_step_is_not_noted_for_ever(static):
    net, x = nn.Linear(4, 4), torch.randn(3, 4)
    assert not any(static(net, lambda number: lambda: (1.0 + number) * net(x).square().sum(), 12))
    assert patterns_of(list(net.parameters())).first().plain


def test_constants_may_have_other_values(static):
    net, weight = mlp(), torch.ones(3)

    def closure_of(number: int) -> Closure:
        weight.mul_(1.1)
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        return lambda: F.cross_entropy(net(x), y, weight=weight)

    assert static(net, closure_of) == [False, False, True, True]


SAME = {
    "an autoencoder's input and target": lambda net, x, other: F.mse_loss(net(x), other),
    "two inputs": lambda net, x, other: (net(x) * net(other)).square().mean(),
    "parts of one tensor": lambda net, x, other: (net(x[:4]) * net(other[4:])).square().mean(),
}


@pytest.mark.parametrize("kind", SAME)
def test_one_constant_at_two_places_may_be_two_the_next_time(static, kind):
    net = nn.Linear(6, 6)

    def closure_of(number: int) -> Closure:
        x = torch.randn(8, 6)
        other = torch.randn(8, 6) if number in CHANGED else x
        return lambda: SAME[kind](net, x, other)

    found = static(net, closure_of, 5)
    assert found[FIRST]
    assert not found[CHANGED[0]]


def test_dropout_of_inputs_comes_after_evaluation_mode(static):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6))

    def closure_of(number: int) -> Closure:
        net.train(number >= CHANGED[0])
        x = torch.randn(8, 6)
        return lambda: F.mse_loss(net(x), x)

    assert static(net, closure_of, 5)[FIRST]


def test_a_constant_overwritten_after_its_use_is_noticed():
    net, scale, late = nn.Linear(3, 3), torch.ones(3), []

    def closure() -> Tensor:
        loss = (net(torch.ones(2, 3)) * scale).square().sum()
        if late:
            scale.zero_()
        return loss

    for _ in range(4):
        imstep.Hessian(closure, net)
    late.append(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        imstep.Hessian(closure, net)


def test_batch_sizes_and_modes_come_and_go(static):
    net = mlp()
    sizes = [8, 8, 8, 5, 5, 5, 8, 5, 8]
    found = static(net, lambda number: classified(net, sizes[number], 6), 9)
    assert found == [False, False, True, False, False, True, True, True, True]
    images = cnn()
    found = static(images, lambda number: classified(images.train(number not in CHANGED), 5, 1, 8, 8), 6)
    assert found[FIRST]
    assert not found[CHANGED[0]]


def test_buffers_are_put_back_after_a_rejected_step():
    images, kept = cnn(), []
    for _ in range(4):
        before = [b.clone() for b in images.buffers()]
        batch = frozen.FrozenClosure(classified(images, 5, 1, 8, 8), ParameterVector(images))
        kept.append(batch.linearise().static)
        assert not all(map(torch.equal, images.buffers(), before))
        batch.leave(accepted=False)
        assert all(map(torch.equal, images.buffers(), before))
    assert kept == [False, False, True, True]


def test_few_structures_are_kept():
    net = nn.Linear(2, 1)
    for size in range(1, 12):
        closure = lambda: net(torch.ones(size, 2)).square().sum()  # noqa: B023
        frozen.FrozenClosure(closure, ParameterVector(net)).linearise()
    assert len(patterns_of(list(net.parameters()))._known) == 4


def test_hooks_and_frozen_parameters_come_and_go(static):
    net, handles = mlp(), []

    def closure_of(number: int) -> Closure:
        if number == 3:
            mask = torch.arange(48).view(8, 6) % 2
            handles.append(net[0].weight.register_hook(lambda g: g * mask))
            handles.append(net[2].register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],)))
        if number == 5:
            for handle in handles:
                handle.remove()
        net[4].requires_grad_(number != 6)
        return classified(net)

    found = static(net, closure_of, 8)
    assert found[FIRST]
    assert not any(found[number] for number in (3, 4, 6))


# --- optimizers -------------------------------------------------------------------------------------------------------


def trained(steps: int) -> tuple[list[bool], list[Tensor]]:
    net, x = mlp(), torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    optimizer = imstep.NewtonKrylov.for_batches(net.parameters())
    torch.manual_seed(0)
    found = []
    for _ in range(steps):
        chosen = torch.randint(32, (16,))

        def closure() -> Tensor:
            return F.cross_entropy(net(x[chosen]), chosen % 3)  # noqa: B023

        optimizer.step(closure)
        found.append(optimizer.last_step.static)
    return found, [p.detach() for p in net.parameters()]


def test_steps_are_the_same_and_tell(monkeypatch):
    found, parameters = trained(6)
    assert found == [False, False, True, True, True, True]
    with recorded_anew(monkeypatch):
        plain, expected = trained(6)
    assert not any(plain)
    assert all(map(torch.equal, parameters, expected))


def test_the_state_of_numpy_is_put_back():
    """Also where a normal number of a pair is left."""
    for before in (0, 1):
        for drawn in range(4):
            np.random.seed(3)
            np.random.randn(before)
            state = NumpyState.now()
            first = np.random.randn(drawn)
            state.restore()
            assert np.array_equal(np.random.randn(drawn), first)
