"""Operators on parameters under fully_shard: those of one process over all batches, on whole and on sharded vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_shared_operators import BATCHES, loss
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from imstep.complexstep.tape import TapeChangedError
from imstep.curvature import Categorical, Fisher, GaussNewton, Hessian, Jacobian
from imstep.curvature.processes import OtherProcessError, ProcessesLostError
from imstep.linalg.sharded import ShardedTensor
from imstep.spectral import density, diagonal, eigenpairs, trace
from imstep.spectral.probes import norms
from tests.launching import Outcomes, outcomes

V = torch.randn(155, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 15), nn.Tanh(), nn.Linear(15, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()


def sharded() -> Any:
    model = network()
    fully_shard(model[0])
    return fully_shard(model, ignored_params={model[2].bias})


def same(ours: Tensor, alone: Tensor) -> None:
    torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-10)


def agree(ours: Any, alone: Any) -> None:
    """Whole products of whole vectors, sharded ones of sharded."""
    n = alone.shape[1]
    v, block = V[:n, 0], V[:n]
    same(ours @ v, alone @ v)
    same(ours @ block, alone @ block)
    for held, expected in ((ours.held(v), alone @ v), (ours.held(block.mT).mT, alone @ block)):
        made = ours @ held
        assert isinstance(made, ShardedTensor)
        assert made.own.numel() < 0.6 * expected.numel()
        same(made.whole(), expected)


def matrices(rank: int) -> None:
    model, plain = sharded(), network()
    group = {"process_group": dist.group.WORLD}
    own = (BATCHES[:1], BATCHES[1:])[rank]
    pair = lambda model: lambda b: (model(b[0]), b[1])
    alone = Hessian.over(BATCHES, loss(plain), plain)
    ours = Hessian.over(own, loss(model), model, **group)
    agree(ours, alone)
    same(ours.gradient.whole(), alone.gradient)
    same(ours.loss, alone.loss)
    same(ours.to_dense(), alone.to_dense())
    for budget in (0, 2000):
        anew = Hessian.over([] if rank else BATCHES, loss(model), model, memory_budget=budget, **group)
        assert anew.recomputes is not None
        agree(anew, alone)
    agree(
        GaussNewton.over(own, pair(model), model, F.cross_entropy, **group),
        GaussNewton.over(BATCHES, pair(plain), plain, F.cross_entropy),
    )
    agree(
        Fisher.over(own, pair(model), model, Categorical(), **group),
        Fisher.over(BATCHES, pair(plain), plain, Categorical()),
    )
    assert all(isinstance(p, DTensor) for p in model[0].parameters())


def lists(rank: int) -> None:
    """Lists of shards for lists of shards, of whole tensors for whole ones; blocks of whole vectors."""
    model, plain = sharded(), network()
    alone = Hessian.over(BATCHES, loss(plain), plain)
    ours = Hessian.over((BATCHES[:1], BATCHES[1:])[rank], loss(model), model, process_group=dist.group.WORLD)
    loss(model)(BATCHES[0]).backward()
    loss(plain)(BATCHES[0]).backward()
    expected = alone @ [p.grad for p in plain.parameters()]
    for made, wanted in zip(ours @ [p.grad for p in model.parameters()], expected, strict=True):
        same(made.full_tensor() if isinstance(made, DTensor) else made, wanted)
    for made, wanted in zip(ours @ [p.grad for p in plain.parameters()], expected, strict=True):
        same(made, wanted)
    assert isinstance(ours.as_parameters(ours.gradient)[0], DTensor)
    part = V[: sum(p.numel() for p in plain[2].parameters())]
    same(ours.block(model[2]) @ part, alone.block(plain[2]) @ part)


def spectra(rank: int) -> None:
    model, plain = sharded(), network()
    alone = Hessian.over(BATCHES, loss(plain), plain)
    ours = Hessian.over((BATCHES[:1], BATCHES[1:])[rank], loss(model), model, process_group=dist.group.WORLD)
    short = eigenpairs(ours, 1, max_products=6)
    found = eigenpairs(ours, 1, tol=1e-11, resume=short.state)
    expected = torch.linalg.eigvalsh(alone.to_dense())
    same(found.values, expected[expected.abs().argmax()][None])
    assert isinstance(found.vectors, ShardedTensor)
    vectors = found.vectors.whole()
    same(alone @ vectors, found.values * vectors)
    assert trace(ours, 0.5).value == pytest.approx(trace(1.0 * alone, 0.5).value, rel=1e-10)  # by products
    same(diagonal(ours, 0.5).value.whole(), diagonal(alone, 0.5).value)
    args = {"steps": 4, "probes": 3, "width": 0.01}
    same(density(ours, **args).values, density(alone, **args).values)
    same((-ours + 0.5 * ours) @ V[:, 0], -0.5 * alone @ V[:, 0])
    assert eigenpairs(0.0 * ours, 1).values.tolist() == [0.0]
    assert norms(ours.held(1e-200 * V[None, :, 0])).item() == pytest.approx(1e-200 * float(V[:, 0].norm()))
    assert isinstance((0.5 * ours + ours).held(V[:, 0]), ShardedTensor)


def jacobians(rank: int) -> None:
    model, plain = sharded(), network()
    outputs = lambda model: lambda b: model(b[0])
    alone = Jacobian.over(BATCHES, outputs(plain), plain)
    for budget in (None, 0):
        ours = Jacobian.over(
            (BATCHES[:1], BATCHES[1:])[rank],
            outputs(model),
            model,
            process_group=dist.group.WORLD,
            memory_budget=budget,
        )
        same(ours.outputs, alone.outputs)
        u = V[: len(alone.outputs.reshape(-1)), 0]
        for v in (V, V[:, 0]):
            same(ours @ v, alone @ v)
            same(ours.T @ (ours @ v), alone.T @ (alone @ v))
        same(ours.T @ u, alone.T @ u)
        same(ours.block(model[0]) @ V[:60], alone.block(plain[0]) @ V[:60])


def faults(rank: int) -> None:
    model, group = sharded(), dist.group.WORLD
    H = Hessian.over(BATCHES, loss(model), model, process_group=group)
    J = Jacobian.over(BATCHES, lambda b: model(b[0]), model, process_group=group)
    with pytest.raises(ValueError, match="holds shards"):
        H @ [p if at else p.detach().full_tensor() for at, p in enumerate(model.parameters())]
    for budget in (None, 0):
        other = Hessian.over(BATCHES, loss(model), model, process_group=group, memory_budget=budget)
        if rank:
            with torch.no_grad():
                model[0].weight.to_local().add_(1)
        for operator in (H, J, other):
            with pytest.raises(TapeChangedError if rank else OtherProcessError):
                operator @ V[:, 0]
    with pytest.raises(ValueError, match=r"process_group=.*over\("):
        Hessian(lambda: loss(model)(BATCHES[0]), model)
    with pytest.raises(ProcessesLostError, match="not at the same place"):
        Hessian.over(BATCHES, loss(model), model, process_group=group) @ V[:, rank]


def one_process(rank: int) -> None:
    """A group of one process, over which a model is sharded all the same."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    model, plain = network(), network()
    fully_shard(model, mesh=DeviceMesh.from_group(groups[rank], "cpu"))
    ours = Hessian.over(BATCHES, loss(model), model, process_group=groups[rank])
    same(ours @ V[:, 0], Hessian.over(BATCHES, loss(plain), plain) @ V[:, 0])


CHECKS = [matrices, lists, spectra, jacobians, faults, one_process]
two = outcomes(2, CHECKS)


@pytest.mark.parametrize("check", [f.__name__ for f in CHECKS])
def test_two_processes(two: Outcomes, check: str) -> None:
    for found in two[check]:
        assert not isinstance(found, str), found
