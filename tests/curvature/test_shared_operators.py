"""Operators over the batches of several processes: those of one process over all batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from imstep.complexstep.tape import TapeChangedError
from imstep.curvature import Categorical, Fisher, GaussNewton, Hessian, Jacobian, MonteCarlo, SumOverBatches
from imstep.curvature.processes import OtherProcessError, ProcessesLostError
from imstep.insight import influence
from imstep.spectral import trace
from tests.launching import Outcomes, outcomes

GENERATOR = torch.Generator().manual_seed(0)
X, V = (torch.randn(shape, dtype=torch.float64, generator=GENERATOR) for shape in ((9, 3), (24, 4)))
LABELS = torch.arange(9) % 3
BATCHES = [(X[:4], LABELS[:4]), (X[4:6], LABELS[4:6]), (X[6:], LABELS[6:])]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def loss(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda b: F.cross_entropy(model(b[0]), b[1])


def same(ours: Any, alone: Any) -> None:
    torch.testing.assert_close(ours @ V[:, 0], alone @ V[:, 0])
    torch.testing.assert_close(ours @ V, alone @ V)
    torch.testing.assert_close(ours.to_dense(), alone.to_dense())


def matrices(rank: int) -> None:
    model, group = network(), dist.group.WORLD
    outputs = lambda b: (model(b[0]), b[1])
    alone = Hessian.over(BATCHES, loss(model), model)
    for batches in ((BATCHES[:1], BATCHES[1:]), ([], BATCHES)):
        own = batches[rank]
        ours = Hessian.over(own, loss(model), model, process_group=group)
        same(ours, alone)
        torch.testing.assert_close((ours.loss, ours.gradient), (alone.loss, alone.gradient))
        assert (ours.batches, ours.recorded) == (3, 3)
        anew = Hessian.over(own, loss(model), model, process_group=group, memory_budget=0)
        torch.testing.assert_close(anew @ V[:, 0], alone @ V[:, 0])
        assert (anew.batches, anew.recorded) == (3, 0)
    own = (BATCHES[:1], BATCHES[1:])[rank]
    of = [(own, {"process_group": group}), (BATCHES, {})]
    same(*(Hessian.over(b, loss(model), model, reduction=SumOverBatches(), **g) for b, g in of))
    same(*(GaussNewton.over(b, outputs, model, F.cross_entropy, **g) for b, g in of))
    same(*(Fisher.over(b, outputs, model, Categorical(), **g) for b, g in of))
    assert GaussNewton.over(own, outputs, model, F.cross_entropy, process_group=group).definite
    torch.testing.assert_close(ours.block(model[2]) @ V[:12, 0], alone.block(model[2]) @ V[:12, 0])
    assert trace(ours).value == pytest.approx(trace(alone).value)


def random_targets(rank: int) -> list[float]:
    """Processes draw targets of their own, also for equal batches."""
    model, batch = network(), BATCHES[0]
    outputs = lambda b: (model(b[0]), b[1])
    make = lambda batches, group: Fisher.over(
        batches, outputs, model, Categorical(), MonteCarlo(), process_group=group
    )
    ours, one = make([batch], dist.group.WORLD), make([batch], None)
    assert not torch.allclose(ours @ V[:, 0], one @ V[:, 0])
    return (ours @ V[:, 0]).tolist()


def jacobians(rank: int) -> None:
    model = network()
    for own in ((BATCHES[:1], BATCHES[1:]), ([], BATCHES), (BATCHES, [])):
        outputs = lambda b: model(b[0])
        ours = Jacobian.over(own[rank], outputs, model, process_group=dist.group.WORLD)
        alone = Jacobian.over(BATCHES, outputs, model)
        assert ours.shape == alone.shape == (27, 24)
        same(ours, alone)
        same(ours.T @ ours, alone.T @ alone)
        torch.testing.assert_close(ours.outputs, alone.outputs)
        torch.testing.assert_close(ours.T.to_dense(), alone.T.to_dense())
        torch.testing.assert_close(ours.block(model[0]) @ V[:12], alone.block(model[0]) @ V[:12])


def influences(rank: int) -> None:
    """Of the examples of all, or of one's own with the weight that they have among all."""
    model, group = network(), dist.group.WORLD
    own = (BATCHES[:1], BATCHES[1:])[rank]
    outputs = lambda b: (model(b[0]), b[1])
    each = lambda b: F.cross_entropy(model(b[0]), b[1], reduction="none")
    ours = GaussNewton.over(own, outputs, model, F.cross_entropy, process_group=group)
    found = influence(ours, Jacobian.over(own, each, model, process_group=group), lambda: model(X[0])[0], damping=0.1)
    alone = GaussNewton.over(BATCHES, outputs, model, F.cross_entropy)
    wanted = influence(alone, Jacobian.over(BATCHES, each, model), lambda: model(X[0])[0], damping=0.1)
    torch.testing.assert_close(found, wanted)
    mine = lambda: torch.cat([each(b) for b in own])
    with pytest.raises(ValueError, match="Pass weight=1/N with their number"):
        influence(ours, mine, lambda: model(X[0])[0], damping=0.1)
    found = influence(ours, mine, lambda: model(X[0])[0], damping=0.1, weight=1 / 9)
    torch.testing.assert_close(found, (wanted[:4], wanted[4:])[rank])


def faults(rank: int) -> None:
    model, group = network(), dist.group.WORLD

    def faulty(b: Any) -> Tensor:
        if rank == 1:
            raise ZeroDivisionError
        return loss(model)(b)

    for over in (Hessian.over, Jacobian.over):
        with pytest.raises(ZeroDivisionError if rank else OtherProcessError):
            over(BATCHES, faulty, model, process_group=group)
        with pytest.raises(ValueError, match="the iterable is empty"):
            over([], loss(model), model, process_group=group)
    with pytest.raises(ProcessesLostError, match="not at the same place"):
        Hessian.over(BATCHES, loss(model), model, process_group=group) @ V[:, rank]
    operators = [
        Hessian.over(BATCHES, loss(model), model, process_group=group),
        Jacobian.over(BATCHES, lambda b: model(b[0]), model, process_group=group),
    ]
    if rank:
        with torch.no_grad():
            model[0].bias += 1
    for operator in operators:
        with pytest.raises(TapeChangedError if rank else OtherProcessError):
            operator @ V[:, 0]
    for over in (Hessian.over, Jacobian.over):
        with pytest.raises(ValueError, match="the parameters of process 1 differ"):
            over(BATCHES, loss(model), model, process_group=group)
    with pytest.raises(TypeError, match=r"process_group must be a process group.*got int"):
        Hessian.over(BATCHES, loss(model), model, process_group=1)


def data_parallel(rank: int) -> None:
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    ours = Hessian.over(BATCHES[rank : rank + 1], loss(wrapped), model, process_group=dist.group.WORLD)
    same(ours, Hessian.over(BATCHES[:2], loss(model), model))
    with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel.*process_group"):
        Hessian(lambda: loss(wrapped)(BATCHES[0]), model)


CHECKS = [matrices, random_targets, jacobians, influences, faults, data_parallel]


two = outcomes(2, CHECKS)


@pytest.mark.parametrize("check", [f.__name__ for f in CHECKS])
def test_two_processes(two: Outcomes, check: str) -> None:
    for found in two[check]:
        assert not isinstance(found, str), found
    assert two[check][0] == two[check][1]
