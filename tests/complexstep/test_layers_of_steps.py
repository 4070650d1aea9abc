"""Layers of recurrent networks as operators: against finite differences, and steps written out here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import imstep
from imstep.complexstep import gru_layer, lstm_layer, rnn_layer
from imstep.complexstep.registry import lookup

F64 = torch.float64
T, BATCH, HIDDEN = 4, 2, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _arguments(gates: int, states: int = 1, bias: bool = False) -> list[Tensor]:
    """Projected inputs, the first states, the weight, and the bias."""
    wide = gates * HIDDEN
    shapes = [(T, BATCH, wide), *[(BATCH, HIDDEN)] * states, (wide, HIDDEN), *[(wide,)] * bias]
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


LAYERS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]] = {
    "gru": (lambda *args: gru_layer.Layer.apply(*args)[:3], _arguments(3, bias=True)),
    "gru without bias": (lambda *args: gru_layer.Layer.apply(*args, None)[:3], _arguments(3)),
    "lstm": (lambda *args: lstm_layer.Layer.apply(*args)[:3], _arguments(4, states=2)),
    "rnn": (lambda *args: (rnn_layer.Layer.apply(*args, False),), _arguments(1)),
}


@pytest.mark.parametrize("used", ["states", "all"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_finite_differences(name, used):
    """Once and twice, also of the activations, which only a second derivative asks for."""
    layer, arguments = LAYERS[name]
    leaves = [t.clone().requires_grad_() for t in arguments]
    f = layer if used == "all" else lambda *args: layer(*args)[0]
    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


def _operators() -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], OpOverload, list[Tensor | None]]]:
    """Functions of their arguments, the operators that compute them, and the arguments these have besides."""
    ops, (p, h, w, b) = torch.ops.imstep, _arguments(3, bias=True)
    hs, a, q, k = ops.gru_layer(p, h, w, b)

    def backward(*args: Tensor) -> tuple[Tensor, ...]:
        _, a, q, hs, h, _ = args
        return ops.gru_layer_backward(*args, gru_layer._factors(a, q, torch.cat([h[None], hs[:-1]])))

    arguments = [normal(*hs.shape, seed=9), a, q, hs, h, w]
    return {
        "forward": (lambda *args: ops.gru_layer(*args)[:3], [p, h, w, b], ops.gru_layer.default, []),
        "without bias": (lambda *args: ops.gru_layer(*args, None)[:3], [p, h, w], ops.gru_layer.default, [None]),
        "backward": (backward, arguments, ops.gru_layer_backward.default, [k]),
    }


OPERATORS = _operators()
CASES = [(name, at) for name, (_, args, *_) in OPERATORS.items() for at in (None, *range(len(args)))]


@pytest.mark.parametrize(("name", "at"), CASES)
def test_changes_are_those_of_finite_differences(name, at):
    """Of all arguments together, and of each alone."""
    several, arguments, *_ = OPERATORS[name]
    f = lambda *args: torch.cat([t.flatten() for t in several(*args)])
    changes = [normal(*t.shape, seed=20 + i) * (at is None or i == at) for i, t in enumerate(arguments)]
    if at is None:
        of, point, change = f, tuple(arguments), tuple(changes)
    else:
        of = lambda t: f(*arguments[:at], t, *arguments[at + 1 :])
        point, change = (arguments[at],), (changes[at],)
    found = imstep.jvp(of, point, change)[1]
    moved = lambda s: f(*(t + s * d for t, d in zip(arguments, changes, strict=True)))
    torch.testing.assert_close(found, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("name", "at"), CASES)
def test_a_block_of_changes_is_its_changes(name, at):
    _, arguments, operator, rest = OPERATORS[name]
    given = [*arguments, *rest]
    padded = [i < len(arguments) and at in (None, i) for i in range(len(given))]
    push = lookup(operator).linearize(operator, given, {})[1]
    block = [normal(3, *t.shape, seed=i) if of else None for i, (t, of) in enumerate(zip(given, padded, strict=True))]
    dims = [0 if t is not None else None for t in block]
    found = torch.func.vmap(lambda *change: tuple(push(*change)[:3]), tuple(dims))(*block)
    for at_block in range(3):
        expected = push(*(None if t is None else t[at_block] for t in block))
        for y, one in zip(found, expected, strict=False):
            torch.testing.assert_close(y[at_block], one, rtol=1e-12, atol=1e-13)


# --- a network of steps written out here ----------------------------------------------------------------------------


def _written_out(q: dict[str, Tensor], x: Tensor, layers: int = 1, ways: int = 1) -> Tensor:
    """All outputs of a GRU, (time, batch, ...), by the formulas in PyTorch's documentation."""
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            end = f"_l{layer}" + ("_reverse" if way else "")
            h, ys = x.new_zeros(x.shape[1], q[f"weight_hh{end}"].shape[1]), []
            for step in x.flip(0) if way else x:
                of_x = (step @ q[f"weight_ih{end}"].T + q.get(f"bias_ih{end}", 0)).chunk(3, 1)
                of_h = (h @ q[f"weight_hh{end}"].T + q.get(f"bias_hh{end}", 0)).chunk(3, 1)
                r, z = ((a + b).sigmoid() for a, b in zip(of_x[:2], of_h[:2], strict=True))
                h = (1 - z) * (of_x[2] + r * of_h[2]).tanh() + z * h
                ys.append(h)
            outputs.append(torch.stack(ys[::-1] if way else ys))
        x = torch.cat(outputs, 2)
    return x


X = normal(T, BATCH, 2, seed=5)
NETWORKS = {
    "one layer": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both ways": {"num_layers": 2, "bidirectional": True},
}


def _setting(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor, nn.GRU]:
    """A loss of all parameters in one vector by the layer, and by the steps; the vector; the layer."""
    torch.manual_seed(0)
    options = NETWORKS[name]
    module = nn.GRU(2, 3, **options).double()
    shapes = {k: p.shape for k, p in module.named_parameters()}

    def named(v: Tensor) -> dict[str, Tensor]:
        parts = v.split([s.numel() for s in shapes.values()])
        return {k: t.view(s) for t, (k, s) in zip(parts, shapes.items(), strict=True)}

    steps = partial(_written_out, layers=options.get("num_layers", 1), ways=1 + options.get("bidirectional", False))
    loss = lambda y: (y * normal(*y.shape, seed=6)).sum().square() + y.pow(3).sum()
    vector = torch.cat([p.detach().flatten() for p in module.parameters()])
    return (
        lambda v: loss(functional_call(module, named(v), (X,))[0]),
        lambda v: loss(steps(named(v), X)),
        vector,
        module,
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_hessian_is_that_of_the_steps(name):
    of_layer, of_steps, vector, module = _setting(name)
    y = lambda: torch.nn.utils.parameters_to_vector(module.parameters())
    expected = torch.autograd.functional.hessian(of_steps, vector)
    found = imstep.Hessian(lambda: of_layer(y()), module).to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
def test_third_derivatives_are_those_of_the_steps(name):
    of_layer, of_steps, vector, _ = _setting(name)
    directions = [normal(len(vector), seed=seed) for seed in (1, 2)]
    x = vector.clone().requires_grad_()
    (g,) = torch.autograd.grad(of_steps(x), x, create_graph=True)
    for this, last in pairwise((*directions, None)):
        (g,) = torch.autograd.grad(g @ this, x, create_graph=last is not None)
    torch.testing.assert_close(imstep.third_derivative(of_layer, vector, *directions), g, rtol=1e-10, atol=1e-11)


def test_a_layer_is_one_operator_each_way():
    module = nn.GRU(2, 3).double()
    operator = imstep.Hessian(lambda: module(X)[0].square().sum(), module)
    counts = {use.operator: use.count for use in operator.explain().uses}
    own = {name: count for name, count in counts.items() if name.startswith("imstep")}
    assert own == {"imstep.gru_layer.default": 1, "imstep.gru_layer_backward.default": 1}
    assert sum(counts.values()) < 40
