"""A small network, and a batch in unequal parts, for steps of several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from optim_cases import normal
from torch import Tensor, nn

from imstep.optim import NewtonKrylov

X, Y = normal(12, 4), normal(12, 2, seed=1)
Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def grouped(model: nn.Module, kind: Any = NewtonKrylov, **options: Any) -> NewtonKrylov:
    return kind(model.parameters(), process_group=dist.group.WORLD, **options)


def parts(batch: Batch, size: int = 2) -> list[Batch]:
    """Of a batch, of unequal sizes."""
    x, y = batch
    cuts = [len(x) * 2 // 3, len(x)] if size == 2 else [5, 6, 9, 12]
    return [(x[a:b], y[a:b]) for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]


def said(model: nn.Module, step: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """The text of the error that a step raises, which leaves the parameters alone."""
    before = flat(model)
    with pytest.raises(kind) as caught:
        step()
    assert torch.equal(flat(model), before)
    return str(caught.value)


def all_are_told(found: Sequence[dict[str, str]], words: dict[str, str]) -> None:
    """Every process was told these words, by what was refused."""
    for name, wanted in words.items():
        assert all(wanted in of_rank[name] for of_rank in found), name


def succeeded(found: list[Any]) -> list[Any]:
    """What a check returned in each process; the text of an error fails here."""
    for value in found:
        assert not isinstance(value, str), value
    return found
