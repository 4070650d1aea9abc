"""Kronecker factors under fully_shard: each layer's in one process, and steps as of one process that has them all."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from optim_cases import normal
from shared_cases import parts, succeeded
from test_sharded import Odd, close, odd, over, train, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from imstep.curvature.kronecker_blocks import Block, EigenBlock
from imstep.curvature.kronecker_inverse import KroneckerInverse
from imstep.linalg.sharded import own_entries
from imstep.optim import Kronecker, KroneckerEigenbasis, NewtonKrylov
from imstep.optim.preconditioning import TikhonovDamping
from tests.launching import launch, outcomes

WHOLE = X, Y = normal(12, 4), normal(12, 2, seed=1)
KINDS: dict[str, Any] = {
    "factored": Kronecker(),
    "tikhonov": Kronecker(damping=TikhonovDamping()),
    "moments": KroneckerEigenbasis(basis_every=2),
}


class Deep(nn.Module):
    """Equal layers of whose weights not every process has some, a shared bias, a convolution, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.inner = nn.Linear(4, 7), nn.ModuleList([nn.Linear(7, 7) for _ in range(4)])
        self.inner[1].bias = self.inner[0].bias
        self.conv, self.scale, self.last = nn.Conv1d(1, 3, 2), nn.Parameter(torch.ones(2)), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(2 * self.first(x))
        x = sum(torch.sin(layer(x) + at) for at, layer in enumerate(self.inner))
        return self.scale * self.last(torch.sin(self.conv(x[:, None])).mean(2))


def sharded() -> Any:
    model = Deep()
    fully_shard(model.first)
    return fully_shard(model, ignored_params={model.conv.bias})


def nbytes(value: Any) -> int:
    """Of the matrices that are held here by the factors and inverses of layers."""
    if isinstance(value, Tensor):
        return own_entries(value).untyped_storage().nbytes()
    if isinstance(value, (list, tuple, dict)):
        return sum(map(nbytes, value.values() if isinstance(value, dict) else value))
    if isinstance(value, partial):
        return nbytes([getattr(value.func, "__self__", None), *value.args, *value.keywords.values()])
    return nbytes(vars(value)) if isinstance(value, (Block, EigenBlock)) else 0


def held(optimizer: Any) -> list[int]:
    """By averages, by moments, and by inverses."""
    kept, inverse = optimizer._preconditioner, optimizer._preconditioner._inverse
    inverses = inverse._inverses if isinstance(inverse, KroneckerInverse) else [of for _, of in inverse._made[0]]
    return [nbytes(of) for of in (kept._factors._blocks, getattr(kept._inverses, "_blocks", {}), inverses)]


def steps(rank: int) -> Any:
    found: dict[str, Any] = {}
    for name, kind in KINDS.items():
        model = sharded()
        optimizer = over(model, preconditioning=kind)
        losses = train(model, optimizer, [parts(WHOLE)[rank]], 3)
        found[name] = losses, whole(model.parameters()), held(optimizer)
        found[f"{name}, saved"] = saved(optimizer, kind, rank)
    return found


def saved(optimizer: NewtonKrylov, kind: Any, rank: int) -> Any:
    """Where a step leads in an optimizer that the state of this one was loaded into."""
    state, model = optimizer.state_dict(), sharded()
    owner = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        for p, q in zip(model.parameters(), owner, strict=True):
            p.copy_(q)
    again = over(model, preconditioning=kind)
    again.load_state_dict(state)
    train(model, again, [parts(WHOLE)[rank]], 1)
    return whole(model.parameters())


def in_pieces(rank: int) -> Any:
    model = sharded()
    optimizer = over(model, preconditioning=KroneckerEigenbasis())
    pieces = [(X[a:b], Y[a:b]) for a, b in ((0, 3), (3, 7), (7, 12))]
    train(model, optimizer, pieces[:2] if rank else pieces[2:], 2)
    return whole(model.parameters())


def without_data(rank: int) -> Any:
    model = odd()
    optimizer = over(model, preconditioning=KroneckerEigenbasis())
    train(model, optimizer, [WHOLE] if rank else [], 2)
    return whole(model.parameters())


def of_four(rank: int) -> Any:
    model = sharded()
    optimizer = over(model, preconditioning=Kronecker())
    train(model, optimizer, [parts(WHOLE, 4)[rank]], 2)
    return held(optimizer), whole(model.parameters())


CHECKS = (steps, in_pieces, without_data)
two = outcomes(2, CHECKS)


def alone(kind: Any, count: int = 3) -> tuple[list[float], list[float], list[int]]:
    model = Deep()
    optimizer = NewtonKrylov(model.parameters(), preconditioning=kind)
    return train(model, optimizer, [WHOLE], count), whole(model.parameters()), held(optimizer)


@pytest.mark.parametrize("name", KINDS)
def test_steps_are_those_of_one_process(two: Any, name: str) -> None:
    first, second = (of_rank[name] for of_rank in succeeded(two["steps"]))
    losses, end, all_of_it = alone(KINDS[name])
    assert first[:2] == second[:2]
    assert close(first[:2], [losses, end])
    for one, other, total in zip(first[2], second[2], all_of_it, strict=True):
        assert one + other <= total
        assert max(one, other) <= 0.6 * total


@pytest.mark.parametrize("name", KINDS)
def test_a_state_goes_on_in_two_processes(two: Any, name: str) -> None:
    first, second = (of_rank[f"{name}, saved"] for of_rank in succeeded(two["steps"]))
    assert first == second
    assert close([first], [alone(KINDS[name], 4)[1]])


@pytest.mark.parametrize(("check", "make"), [("in_pieces", Deep), ("without_data", Odd)])
def test_pieces_and_odd_parameters(two: Any, check: str, make: Any) -> None:
    first, second = succeeded(two[check])
    model = make()
    optimizer = NewtonKrylov(model.parameters(), preconditioning=KroneckerEigenbasis())
    train(model, optimizer, [WHOLE], 2)
    assert first == second
    if check == "without_data":  # targets of pieces are drawn by each process
        assert close([first], [whole(model.parameters())])


def test_memory_falls_with_the_number_of_processes() -> None:
    found = succeeded(launch(4, of_four)["of_four"])
    _, end, (total, _, inverses) = alone(Kronecker(), 2)
    memory = [of_rank[0] for of_rank in found]
    assert sum(own[0] for own in memory) == total
    assert max(own[0] for own in memory) < 0.4 * total
    assert max(own[2] for own in memory) < 0.4 * inverses
    assert close([found[0][1]], [end])
