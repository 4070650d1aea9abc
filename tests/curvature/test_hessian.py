"""The Hessian as an operator: against double backward, as a linear and symmetric map, and when its point is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import build, dense_jacobian, differentiable_kernels, hessian_products, normal, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import imstep
from imstep.complexstep.tape import TapeChangedError
from imstep.curvature import FrozenClosure, Hessian, Jacobian, ParameterVector
from imstep.linalg import conjugate_gradient

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
Problem = tuple[nn.Module, Callable[[], Tensor]]


def labelled(z: Tensor) -> Tensor:
    rows = z.flatten(0, -2)
    return F.cross_entropy(rows, torch.arange(len(rows)) % rows.shape[1])


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mlp": labelled,
    "conv": lambda z: F.mse_loss(z, normal(*z.shape, seed=1, dtype=z.dtype)),
    "lstm": lambda z: F.huber_loss(z, normal(*z.shape, seed=1, dtype=z.dtype)),
    "attention": labelled,
}


def problem(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    model, inputs = build(name)
    model = model.to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return model, lambda: LOSSES[name](model(inputs))


def mlp() -> Problem:
    return problem("mlp")


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return relative_error(actual, expected) <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", LOSSES)
def test_against_double_backward(name: str, dtype: torch.dtype) -> None:
    model, closure = problem(name, dtype)
    H = Hessian(closure, model)
    assert (H.dtype, H.size) == (dtype, sum(p.numel() for p in model.parameters()))
    block = normal(H.size, 3, seed=2, dtype=dtype)
    params = list(model.parameters())
    with differentiable_kernels():
        loss = closure()
        gradient, expected = dense_jacobian(loss, params)[0], hessian_products(closure(), params, block)
    tolerance = TOLERANCE[dtype]
    assert close(H.loss, loss.detach(), tolerance)
    assert close(H.gradient, gradient, tolerance)
    products = H @ block
    assert H.products == 3
    assert close(products, expected, tolerance)
    singles = torch.stack([H @ v for v in block.unbind(1)], dim=1)
    assert close(singles, products, tolerance / 10)
    assert H.products == 6
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_replay_is_the_one_shot_product(name: str) -> None:
    model, closure = problem(name)
    vector = ParameterVector(model)
    v = normal(vector.size, seed=3)
    product = Hessian(closure, model) @ v
    assert close(FrozenClosure(closure, vector).product(v), product, 1e-13)
    assert close(FrozenClosure(closure, vector).product(v, h=1e-30), product, 1e-12)


def test_is_the_hvp_of_the_functional_interface() -> None:
    model, _ = mlp()
    x = normal(8, 4)
    f = lambda parts: functional_call(model, parts, (x,)).logsumexp(1).sum()
    parts = {k: p.detach() for k, p in model.named_parameters()}
    directions = {k: normal(*p.shape, seed=i) for i, (k, p) in enumerate(parts.items())}
    by_function = imstep.hvp(f, parts, directions)
    H = Hessian(lambda: f(dict(model.named_parameters())), model)
    flat = lambda tree: torch.cat([t.reshape(-1) for t in tree.values()])
    assert close(H @ flat(directions), flat(by_function), 1e-13)


@given(st.integers(0, 2**31), st.floats(-3, 3), st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_linear_and_symmetric(seed: int, a: float, b: float) -> None:
    model, closure = mlp()
    H = Hessian(closure, model)
    u, v = normal(H.size, seed=seed), normal(H.size, seed=seed + 1)
    Hu, Hv = H @ u, H @ v
    assert (H @ (a * u + b * v) - a * Hu - b * Hv).norm() <= 1e-12 * (abs(a) * Hu.norm() + abs(b) * Hv.norm() + 1e-300)
    assert abs(u @ Hv - v @ Hu) <= 1e-12 * u.norm() * Hv.norm()


def test_dense() -> None:
    model, closure = mlp()
    H = Hessian(closure, model)
    expected = hessian_products(closure(), list(model.parameters()), torch.eye(H.size, dtype=torch.float64))
    assert close(H.to_dense(), expected, 1e-12)
    assert (H @ torch.zeros(H.size, 0, dtype=H.dtype)).shape == (H.size, 0)


def test_works_with_a_solver() -> None:
    model, closure = mlp()
    H = Hessian(closure, model)
    x = conjugate_gradient(H, H.gradient, damping=5.0).solution
    assert (H @ x + 5 * x - H.gradient).norm() <= 1e-5 * H.gradient.norm()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_closures_that_call_backward(set_to_none: bool) -> None:
    model, closure = mlp()
    v = normal(ParameterVector(model).size, seed=1)
    expected = Hessian(closure, model)
    kept = [torch.full_like(p, 7.0) for p in model.parameters()]
    for p, g in zip(model.parameters(), kept, strict=True):
        p.grad = g

    def lbfgs_form() -> Tensor:
        model.zero_grad(set_to_none=set_to_none)
        loss = closure()
        loss.backward()
        return loss

    H = Hessian(lbfgs_form, model)
    assert torch.equal(H.gradient, expected.gradient)
    assert torch.equal(H @ v, expected @ v)
    assert all(p.grad is g and bool((g == 7).all()) for p, g in zip(model.parameters(), kept, strict=True))


def test_gradients_accumulated_over_parts_of_a_batch() -> None:
    model, _ = mlp()
    x, y = normal(8, 4), normal(8, 3, seed=1)

    def accumulate() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in (slice(0, 3), slice(3, 8)):
            loss = F.mse_loss(model(x[part]), y[part], reduction="sum")
            loss.backward()
            total += loss.detach()
        return total

    H = Hessian(accumulate, model)
    whole = Hessian(lambda: F.mse_loss(model(x), y, reduction="sum"), model)
    v = normal(H.size, seed=2)
    assert close(H.loss, whole.loss, 1e-14)
    assert close(H @ v, whole @ v, 1e-13)


def test_mixed_precisions() -> None:
    a = nn.Parameter(torch.tensor([1.0, 2.0]))
    b = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    H = Hessian(lambda: (a.double() ** 2 * b).sum() + b.sum() ** 3, [a, b])
    expected = torch.tensor([[6.0, 0.0, 2.0], [0.0, 6.0, 4.0], [2.0, 4.0, 18.0]], dtype=torch.float64)
    torch.testing.assert_close(H.to_dense(), expected)


def test_parameters_in_one_storage() -> None:
    memory = normal(9)
    a, b = nn.Parameter(memory[1:4]), nn.Parameter(memory[4:8].view(2, 2))
    loss = lambda a, b: (a**3).sum() + (b.reshape(-1)[:3] ** 2 * a).sum() + b.prod()
    H = Hessian(lambda: loss(a, b), [a, b])
    together = torch.cat([a.detach(), b.detach().reshape(-1)])
    expected = torch.autograd.functional.hessian(lambda q: loss(q[:3], q[3:].view(2, 2)), together)
    assert close(H.to_dense(), expected, 1e-14)
    v = normal(7, seed=1)
    assert close(H @ v, expected @ v, 1e-14)
    assert close(FrozenClosure(lambda: loss(a, b), ParameterVector([a, b])).product(v, h=1e-30), expected @ v, 1e-12)


def test_parameters_that_the_loss_ignores() -> None:
    used, unused = nn.Parameter(normal(3)), nn.Parameter(normal(2))
    H = Hessian(lambda: (used**2).sum(), [used, unused])
    assert H.to_dense().diagonal().tolist() == [2, 2, 2, 0, 0]
    assert H.gradient[3:].tolist() == [0, 0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_row_for_padding_is_a_constant_where_it_is_looked_up(tied: bool) -> None:
    table, head = nn.Embedding(6, 4, padding_idx=0).double(), nn.Linear(4, 6).double()
    with torch.no_grad():
        table.weight.copy_(normal(6, 4, seed=1))
    head.weight = table.weight if tied else head.weight
    words, labels = torch.tensor([[1, 2, 0], [3, 0, 0], [5, 4, 1]]), torch.tensor([2, 0, 4])
    padding = table.weight[:1].detach().clone()

    def loss(weight: Tensor, outputs: Tensor) -> Tensor:
        rows = torch.cat([padding, weight[1:]])[words]
        return F.cross_entropy(F.linear(rows.tanh().mean(1), outputs), labels)

    modules = nn.ModuleList([table, head])
    H = Hessian(lambda: F.cross_entropy(F.linear(table(words).tanh().mean(1), head.weight), labels), modules)
    params = [table.weight] if tied else [table.weight, head.weight]
    n = 24 * len(params)
    expected = hessian_products(loss(table.weight, head.weight), params, torch.eye(n).double())
    assert close(H.to_dense()[:n, :n], expected, 1e-12)
    J = Jacobian(lambda: table(words).sin(), table)
    assert close(J @ torch.eye(24).double(), (J.T @ torch.eye(36).double()).mT, 1e-12)


def overwrite(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[2].weight.mul_(2)


def write_through_data(model: nn.Sequential) -> None:
    model[2].weight.data.mul_(2)


def exchange_entries_through_data(model: nn.Sequential) -> None:
    for p in model.parameters():
        p.data.copy_(p.data.flip(0))


def take_an_sgd_step(model: nn.Sequential) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", [overwrite, write_through_data, exchange_entries_through_data, take_an_sgd_step])
def test_changed_parameters_are_noticed(change: Callable[[nn.Module], None]) -> None:
    model, closure = mlp()
    H = Hessian(closure, model)
    v = normal(H.size)
    H @ v
    change(model)
    with pytest.raises(TapeChangedError, match=r"changed in place .* new point"):
        H @ v
    with pytest.raises(TapeChangedError):
        H @ v[:, None]


def test_changed_data_is_noticed() -> None:
    layer, x = nn.Linear(3, 2).double(), normal(5, 3)
    H = Hessian(lambda: layer(x).tanh().sum(), layer)
    x.zero_()
    with pytest.raises(TapeChangedError, match="changed in place"):
        H @ normal(H.size)


def test_a_write_that_autograd_does_not_see_is_seen_by_the_next_operator() -> None:
    w = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    loss = lambda: nn.functional.gelu(w).square().sum()
    old = imstep.Hessian(loss, [w])  # alive, with what it holds of the old point
    w.data.mul_(2.0)
    gradient = torch.autograd.grad(loss(), w, create_graph=True)[0]
    expected = torch.autograd.grad(gradient.sum(), w)[0]
    torch.testing.assert_close(imstep.Hessian(loss, [w]) @ torch.ones_like(w), expected)
    assert old.size == 3


def test_replaced_parameters_leave_the_old_point() -> None:
    model, closure = mlp()
    H = Hessian(closure, model)
    v = normal(H.size)
    before = H @ v
    nn.utils.vector_to_parameters(normal(H.size, seed=1), model.parameters())
    assert torch.equal(H @ v, before)


def test_products_do_not_touch_random_numbers() -> None:
    model, closure = mlp()
    H = Hessian(closure, model)
    state = torch.get_rng_state()
    H @ normal(H.size)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_vectors() -> None:
    model, closure = mlp()
    H = Hessian(closure, model)
    with pytest.raises(ValueError, match="shape"):
        H @ normal(H.size + 1)
    with pytest.raises(TypeError, match="float32"):
        H @ normal(H.size).float()
