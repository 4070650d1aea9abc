"""Sub-matrices of some of the parameters: what the whole matrix has there, by fewer steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_cases import F64, build, hessian_products, normal, relative_error
from torch import Tensor, nn

import imstep
from imstep.complexstep.tape import TapeChangedError
from imstep.curvature import Categorical
from imstep.curvature.operators import PointOperator

Build = Callable[[nn.Module, Tensor, int | None], PointOperator]


def labels(z: Tensor) -> Tensor:
    return torch.arange(len(z)) % z.shape[1]


def over(model: nn.Module, x: Tensor, budget: int | None) -> PointOperator:
    return imstep.Hessian.over(x.split(2), lambda part: model(part).pow(2).mean(), model, memory_budget=budget)


OPERATORS: dict[str, Build] = {
    "Hessian": lambda model, x, budget: imstep.Hessian(lambda: model(x).pow(2).mean(), model, budget),
    "GaussNewton": lambda model, x, budget: imstep.GaussNewton(
        lambda: (model(x), labels(model(x))), model, F.cross_entropy, budget
    ),
    "Fisher": lambda model, x, budget: imstep.Fisher(
        lambda: (model(x), labels(model(x))), model, Categorical(), None, budget
    ),
    "batches": over,
}


def places(model: nn.Module, chosen: list[Tensor]) -> Tensor:
    starts, at = {}, 0
    for p in model.parameters():
        starts[id(p)] = torch.arange(at, at + p.numel())
        at += p.numel()
    return torch.cat([starts[id(p)] for p in chosen])


@pytest.mark.parametrize("memory_budget", [None, 0])
@pytest.mark.parametrize("model_name", ["mlp", "conv", "gru"])
@pytest.mark.parametrize("name", OPERATORS)
def test_is_the_part_of_the_whole(name: str, model_name: str, memory_budget: int | None) -> None:
    model, x = build(model_name)
    operator = OPERATORS[name](model.eval(), x, memory_budget)
    dense = OPERATORS[name](model, x, None).to_dense()
    params = list(model.parameters())
    rows, columns = [params[-1], params[0]], [params[1], params[-2]]
    block = operator.block(rows)
    expected = dense[places(model, rows)][:, places(model, rows)]
    v = normal(len(expected), 2)
    assert relative_error(block @ v, expected @ v) < 1e-12
    assert relative_error(block @ v[:, 0], expected @ v[:, 0]) < 1e-12
    assert relative_error(block.T @ v, expected @ v) < 1e-12
    assert block.products == 5
    aside = operator.block(rows, columns)
    expected = dense[places(model, rows)][:, places(model, columns)]
    u, v = normal(aside.shape[0]), normal(aside.shape[1])
    assert relative_error(aside @ v, expected @ v) < 1e-12
    assert relative_error(aside.T @ u, expected.T @ u) < 1e-12


def test_whole_model_and_its_parts() -> None:
    model, x = build("mlp")
    H = OPERATORS["Hessian"](model, x, None)
    assert relative_error(H.block(model).to_dense(), H.to_dense()) < 1e-14
    parts = [H.block(layer).to_dense() for layer in (model[0], model[2], model[4])]
    mask = torch.block_diag(*(torch.ones_like(p) for p in parts)).bool()
    assert relative_error(torch.block_diag(*parts)[mask], H.to_dense()[mask]) < 1e-14
    np.testing.assert_allclose(H.block(model[4]).to_scipy() @ np.eye(18), parts[2].numpy(), atol=1e-15)


def test_steps_of_other_parameters_are_left_out() -> None:
    model, x = build("mlp")
    H = OPERATORS["Hessian"](model, x, None)
    assert H.block(model[4]).nbytes < 0.7 * H.nbytes
    assert H.block(model).nbytes == H.nbytes


def test_directions_of_many_small_steps_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loop has gathered is large; what it takes is time for each of its small parts."""
    w, blocks, vmap = nn.Parameter(normal(60)), [], torch.vmap

    def closure() -> torch.Tensor:
        state, seen = w.new_zeros(60), []
        for _ in range(100):
            state = (state + 0.1 * w).tanh()
            seen.append(state)
        return torch.stack(seen).square().sum()

    def counted(function: object) -> object:
        return lambda given, into: (blocks.append(len(given)), vmap(function)(given, into))

    H = imstep.Hessian(closure, [w])
    monkeypatch.setattr(torch, "vmap", counted)
    whole = H @ torch.eye(60, dtype=w.dtype)
    assert blocks == [60]
    expected = torch.autograd.functional.hessian(_unrolled, w.detach())
    assert relative_error(whole, expected) < 1e-12


def _unrolled(w: torch.Tensor) -> torch.Tensor:
    total, state = w.new_zeros(()), w.new_zeros(60)
    for _ in range(100):
        state = (state + 0.1 * w).tanh()
        total = total + state.square().sum()
    return total


def test_parameters_in_one_storage() -> None:
    memory = normal(9)
    a, b = nn.Parameter(memory[1:4]), nn.Parameter(memory[4:8].view(2, 2))
    H = imstep.Hessian(lambda: (a**3).sum() + (b.reshape(-1)[:3] ** 2 * a).sum() + b.prod(), [a, b])
    dense = H.to_dense()
    assert relative_error(H.block([a]).to_dense(), dense[:3, :3]) < 1e-15
    assert relative_error(H.block([b]).to_dense(), dense[3:, 3:]) < 1e-15
    assert relative_error(H.block([b], [a]).to_dense(), dense[3:, :3]) < 1e-15


def test_memory_overwritten_by_another_parameter() -> None:
    a, b = nn.Parameter(normal(4)), nn.Parameter(normal(2, seed=1))

    def closure() -> Tensor:
        z = a * a
        z[1:3] = b.sin()
        return (z.cumsum(0) ** 3).sum()

    H = imstep.Hessian(closure, [a, b])
    dense = hessian_products(closure(), [a, b], torch.eye(6, dtype=F64))
    assert relative_error(H.block([a]).to_dense(), dense[:4, :4]) < 1e-14
    assert relative_error(H.block([b]).to_dense(), dense[4:, 4:]) < 1e-14
    assert relative_error(H.block([a], [b]).to_dense(), dense[:4, 4:]) < 1e-14


def test_parameters_that_have_nothing_in_common() -> None:
    a, b = nn.Parameter(normal(3)), nn.Parameter(normal(2))
    block = imstep.Hessian(lambda: a.exp().sum() + b.exp().sum(), [a, b]).block([a], [b])
    assert torch.equal(block @ normal(2, 4), torch.zeros(3, 4, dtype=F64))
    assert torch.equal(block.T @ normal(3), torch.zeros(2, dtype=F64))


def test_refusals() -> None:
    model, x = build("mlp")
    H = OPERATORS["Hessian"](model, x, None)
    block = H.block(model[0])
    with pytest.raises(ValueError, match="1 of the 2 parameters of the block are not among"):
        H.block([model[0].weight, nn.Parameter(normal(3))])
    with pytest.raises(ValueError, match="none was given"):
        H.block([])
    with torch.no_grad():
        model[4].bias.add_(1)
    with pytest.raises(TapeChangedError):
        block @ normal(30)
