"""The Jacobian and its transpose: against one backward pass per output, with and without records."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, MODELS, build, dense_jacobian, differentiable_kernels, normal, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import imstep
from imstep.complexstep.tape import TapeChangedError
from imstep.linalg import conjugate_gradient


def jacobian(name: str, memory_budget: int | None = None) -> tuple[imstep.Jacobian, Tensor, nn.Module]:
    model, inputs = build(name)
    operator = imstep.Jacobian(lambda: model(inputs), model, memory_budget)
    with differentiable_kernels():
        outputs = model(inputs)
        dense = dense_jacobian(outputs, list(model.parameters()))
    torch.testing.assert_close(operator.outputs, outputs.detach())
    assert operator.shape == tuple(dense.shape)
    return operator, dense, model


@pytest.mark.parametrize("memory_budget", [None, 0])
@pytest.mark.parametrize("name", MODELS)
def test_against_backward_passes(name: str, memory_budget: int | None) -> None:
    operator, dense, _ = jacobian(name, memory_budget)
    assert (operator.recomputes is None) == (memory_budget is None)
    m, n = operator.shape
    v, u = normal(n, 3), normal(m, 2, seed=1)
    assert relative_error(operator @ v, dense @ v) < 1e-13
    assert relative_error(operator @ v[:, 0], dense @ v[:, 0]) < 1e-13
    assert relative_error(operator.T @ u, dense.T @ u) < 1e-13
    assert relative_error(operator.T @ u[:, 0], dense.T @ u[:, 0]) < 1e-13
    assert operator.products == 7
    assert (operator @ v[:, :0]).shape == (m, 0)
    assert (operator.T @ u[:, :0]).shape == (n, 0)


def test_forms() -> None:
    operator, dense, _ = jacobian("mlp")
    assert relative_error(operator.to_dense(), dense) < 1e-13
    assert relative_error(operator.T.to_dense(), dense.T) < 1e-13
    u, v = normal(operator.shape[0]).numpy(), normal(operator.shape[1]).numpy()
    foreign = operator.to_scipy()
    np.testing.assert_allclose(foreign @ v, dense.numpy() @ v, atol=1e-13)
    np.testing.assert_allclose(foreign.T @ u, dense.numpy().T @ u, atol=1e-13)


def test_columns_of_some_parameters() -> None:
    for budget in (None, 0):
        operator, dense, model = jacobian("mlp", budget)
        first = model[0].weight.numel() + model[0].bias.numel()
        block = operator.block(model[0])
        assert block.shape == (operator.shape[0], first)
        assert relative_error(block.to_dense(), dense[:, :first]) < 1e-13
        u = normal(operator.shape[0])
        assert relative_error(block.T @ u, dense[:, :first].T @ u) < 1e-13
        backwards = operator.block([model[4].bias, model[4].weight])
        assert relative_error(backwards.to_dense(), torch.cat([dense[:, -3:], dense[:, -18:-3]], 1)) < 1e-13


def parameter_itself(w: Tensor) -> Tensor:
    return w


def with_input_derivatives(w: Tensor) -> Tensor:
    x = normal(4).requires_grad_()
    (slope,) = torch.autograd.grad((w.exp() * x**3).sum(), x, create_graph=True)
    return slope + x.detach()


def scalar(w: Tensor) -> Tensor:
    return (w**3).sum()


def partly_constant(w: Tensor) -> Tensor:
    return torch.cat([w[:2].sin(), w[2:].detach()])


def overwriting(w: Tensor) -> Tensor:
    z = torch.zeros(2, 4, dtype=F64)
    z[0] = w.tanh()
    z[1] = z[0].clone() * w
    z.mul_(w)
    return z.t()


def checkpointed(w: Tensor) -> Tensor:
    return checkpoint(lambda t: (t.tanh() * t).cumsum(0), w, use_reentrant=False)


@pytest.mark.parametrize(
    "f", [parameter_itself, with_input_derivatives, scalar, partly_constant, overwriting, checkpointed]
)
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_closures_of_all_kinds(f: Callable[[Tensor], Tensor], memory_budget: int | None) -> None:
    w = nn.Parameter(normal(4, seed=3))
    operator = imstep.Jacobian(lambda: f(w), [w], memory_budget)
    dense = dense_jacobian(f(w), [w])
    assert operator.outputs.shape == f(w).shape
    assert relative_error(operator @ torch.eye(4, dtype=F64), dense) < 1e-14
    assert relative_error(operator.T @ torch.eye(len(dense), dtype=F64), dense.T) < 1e-14


class _Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm, self.head = nn.LSTM(3, 4, batch_first=True), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda t: self.lstm(t)[0][:, -1], x, use_reentrant=False)
        return self.head(F.dropout(self.norm(h), 0.5))


@pytest.mark.parametrize("memory_budget", [None, 0])
def test_one_function_whatever_the_closure_draws_and_overwrites(memory_budget: int | None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = _Dropped().double(), normal(5, 4, 3)
        start = torch.get_rng_state()
        with differentiable_kernels():
            dense = dense_jacobian(model(x), list(model.parameters()))
        after, statistics = torch.get_rng_state(), [b.clone() for b in model.buffers()]
        model.norm.reset_running_stats()
        torch.set_rng_state(start)
        operator = imstep.Jacobian(lambda: model(x), model, memory_budget)
        u, v = normal(10, 2), normal(operator.shape[1], 2)
        for _ in range(2):
            assert relative_error(operator @ v, dense @ v) < 1e-13
            assert relative_error(operator.T @ u, dense.T @ u) < 1e-13
        assert torch.equal(torch.get_rng_state(), after)
        torch.testing.assert_close(list(model.buffers()), statistics)


@pytest.mark.parametrize("memory_budget", [None, 0])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_checkpointed_kernels_of_single_precision(kind: type[nn.RNNBase], memory_budget: int | None) -> None:
    """What a checkpoint runs again must be what it ran first: not a fused kernel."""
    layer, x = kind(3, 4, batch_first=True).double(), normal(5, 4, 3)
    with differentiable_kernels():
        dense = dense_jacobian(layer(x)[0], list(layer.parameters()))
    layer, x = layer.float(), x.float()
    closure = lambda: checkpoint(lambda t: layer(t)[0], x, use_reentrant=False)
    operator = imstep.Jacobian(closure, layer, memory_budget)
    u = normal(len(dense), 2)
    assert relative_error((operator.T @ u.float()).double(), dense.T @ u) < 1e-5


def test_records_share_the_budget() -> None:
    model, inputs = build("mlp")
    closure = lambda: model(inputs)
    whole = imstep.Jacobian(closure, model)
    assert imstep.Jacobian(closure, model, memory_budget=2 * whole.nbytes).recomputes is None
    assert "memory budget" in imstep.Jacobian(closure, model, memory_budget=whole.nbytes - 1).recomputes
    assert "addmm" in str(whole.explain())


def test_single_precision() -> None:
    model, inputs = build("gru")
    dense = dense_jacobian(model(inputs), list(model.parameters()))
    operator = imstep.Jacobian(lambda: model.float()(inputs.float()), model.float())
    assert operator.dtype is torch.float32
    assert relative_error(operator.to_dense().double(), dense) < 1e-5


def test_point_is_watched() -> None:
    operator, _, model = jacobian("mlp")
    operator @ normal(operator.shape[1])
    model[0].weight.data.mul_(2)
    with pytest.raises(TapeChangedError, match="changed in place"):
        operator @ normal(operator.shape[1])
    with pytest.raises(TapeChangedError, match="changed in place"):
        operator.T @ normal(operator.shape[0])
    with pytest.raises(TapeChangedError, match="changed in place"):
        operator.block(model[2]) @ normal(35)


w, unused = nn.Parameter(normal(3)), nn.Parameter(normal(3))


@pytest.mark.parametrize("memory_budget", [None, 0])
@pytest.mark.parametrize(
    ("closure", "error", "words"),
    [
        (lambda: (w, w), TypeError, r"tuple.*torch\.cat"),
        (lambda: w > 0, TypeError, "torch.bool"),
        (lambda: torch.complex(w, w), TypeError, "view_as_real"),
        (lambda: w.detach(), ValueError, "without a graph"),
        (lambda: unused**2, ValueError, "depends on none"),
    ],
)
def test_unusable_outputs(
    closure: Callable[[], Tensor], error: type[Exception], words: str, memory_budget: int | None
) -> None:
    with pytest.raises(error, match=words):
        imstep.Jacobian(closure, [w], memory_budget)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="memory_budget"):
        imstep.Jacobian(lambda: w**2, [w], memory_budget=-1)
    operator = imstep.Jacobian(lambda: (w**2)[:2], [w])
    with pytest.raises(ValueError, match="not among"):
        operator.block([unused])
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        operator @ normal(2)
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        operator.T @ normal(3)
    with pytest.raises(ValueError, match="square"):
        conjugate_gradient(operator, normal(3))


@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_over_batches_is_the_jacobian_of_all(share: float | None) -> None:
    operator, dense, model = jacobian("mlp")
    inputs, seen = build("mlp")[1], []
    told = lambda done, total: seen.append((done, total))
    batches = inputs.split([3, 3, 2])
    room = imstep.Jacobian.over(batches, lambda x: model(x), model, memory_budget=None).nbytes
    memory_budget = None if share is None else int(share * room)
    whole = imstep.Jacobian.over(batches, lambda x: model(x), model, memory_budget=memory_budget, progress=told)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    reason = {None: None, 0.0: "3 of 3 batches", 0.5: "2 of 3 batches"}[share]
    assert whole.recomputes is None if reason is None else whole.recomputes.startswith(reason)
    torch.testing.assert_close(whole.outputs, operator.outputs)
    assert relative_error(whole.to_dense(), dense) < 1e-13
    u, v = normal(whole.shape[0], 2), normal(whole.shape[1], 3)
    assert relative_error(whole @ v, dense @ v) < 1e-13
    assert relative_error(whole.T @ u, dense.T @ u) < 1e-13
    assert relative_error(whole.T @ u[:, 0], dense.T @ u[:, 0]) < 1e-13
    last = whole.block(model[4])
    assert relative_error(last.to_dense(), dense[:, -18:]) < 1e-13
    assert relative_error(last.T @ u, dense[:, -18:].T @ u) < 1e-13
    with pytest.raises(ValueError, match="no batches"):
        imstep.Jacobian.over([], lambda x: model(x), model)


def test_batches_draw_their_random_numbers_once_and_leave_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    before, batches = model[1].running_mean.clone(), [normal(5, 3), normal(4, 3, seed=1)]
    for budget in (None, 0):
        torch.manual_seed(3)
        whole = imstep.Jacobian.over(batches, lambda x: model(x), model, memory_budget=budget)
        first = whole.to_dense()
        assert first.equal(whole.to_dense())
        assert model[1].running_mean.equal(before)
        torch.manual_seed(3)
        parts = [imstep.Jacobian(lambda x=x: model(x), model).to_dense() for x in batches]
        assert relative_error(first, torch.cat(parts)) < 1e-13
        model[1].running_mean.copy_(before)


def test_lists_of_tensors_in_and_out() -> None:
    operator, dense, model = jacobian("mlp")
    directions = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    flat = torch.cat([d.reshape(-1) for d in directions])
    (made,) = operator @ directions
    assert made.shape == operator.outputs.shape
    assert relative_error(made.reshape(-1), dense @ flat) < 1e-13
    assert operator.as_vector(directions).equal(flat)
    assert all(a.equal(b) for a, b in zip(operator.as_parameters(flat), directions, strict=True))


def test_the_gram_matrix_inverts_in_residual_space() -> None:
    operator, dense, _ = jacobian("mlp")
    m, n = operator.shape
    assert m < n
    expected = torch.linalg.solve(dense.T @ dense + 1e-2 * torch.eye(n, dtype=F64), normal(n, 2))
    assert relative_error((operator.T @ operator).inverse(damping=1e-2, rtol=1e-9) @ normal(n, 2), expected) < 1e-9
