"""Several processes: refused where they would drift apart; here as seen by one of two, without the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from optim_cases import normal
from torch import nn

from imstep.curvature import Hessian
from imstep.optim import LeastSquares, NewtonKrylov

METHODS = [NewtonKrylov, LeastSquares]
X, Y = normal(8, 4).float(), normal(8, 2, seed=1).float()


@pytest.fixture
def two_processes() -> Iterator[None]:
    store = pytest.importorskip("torch.testing._internal.distributed.fake_pg").FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backward", [True, False])
def test_data_parallel_models_are_refused(two_processes: None, method: Any, backward: bool) -> None:
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = method(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        if backward:
            loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"DistributedDataParallel.*drift apart.*process_group.*Train in one process"):
        optimizer.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        Hessian(lambda: F.mse_loss(model(X), Y), model)


@pytest.mark.parametrize("method", METHODS)
def test_sharded_parameters_are_refused(two_processes: None, method: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = method(model.parameters())
    with pytest.raises(ValueError, match=r"sharded.*Train in one process"):
        optimizer.step(lambda: F.mse_loss(model(X), Y))


@pytest.mark.parametrize("method", METHODS)
def test_each_process_may_train_a_model_of_its_own(two_processes: None, method: Any) -> None:
    model = net()
    optimizer = method(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert optimizer.last_step.accepted
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer.step(lambda: F.mse_loss(wrapped.module(X), Y))
    assert optimizer.last_step.accepted


@pytest.fixture
def one_process() -> Iterator[None]:
    store = pytest.importorskip("torch.testing._internal.distributed.fake_pg").FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("backward", [True, False])
def test_one_process_is_not_several(one_process: None, group: bool, backward: bool) -> None:
    ends = []
    for wrap in (False, True):
        torch.manual_seed(0)
        plain = net()
        model = nn.parallel.DistributedDataParallel(plain) if wrap else plain
        optimizer = NewtonKrylov(model.parameters(), process_group=dist.group.WORLD if group else None)

        def closure(model: nn.Module = model) -> torch.Tensor:
            loss = F.mse_loss(model(X), Y)
            if backward:
                loss.backward()
            return loss

        optimizer.step(closure)
        assert optimizer.last_step.accepted
        ends.append(torch.cat([p.detach().reshape(-1) for p in plain.parameters()]))
    assert torch.equal(*ends)


def test_collectives_within_the_closure_say_what_to_do(one_process: None) -> None:
    model = net()

    def closure() -> torch.Tensor:
        outputs = model(X)
        dist.all_reduce(outputs)
        return F.mse_loss(outputs, Y)

    with pytest.raises(RuntimeError, match=r"return the loss of its own process's part.*process_group="):
        NewtonKrylov(model.parameters()).step(closure)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_group_is_refused(two_processes: None, method: Any) -> None:
    with pytest.raises(TypeError, match=r"process_group must be a process group.*got str.*init_process_group"):
        method(net().parameters(), process_group="gloo")
    other = dist.new_group([1])
    with pytest.raises((TypeError, ValueError), match="process_group"):
        method(net().parameters(), process_group=other)
