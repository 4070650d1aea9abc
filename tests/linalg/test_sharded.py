"""Vectors that two processes hold a part of each, here two threads: the algebra of whole vectors, or a refusal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from imstep.linalg import DiagonalOperator, gltr, lanczos
from imstep.linalg.dots import dots
from imstep.linalg.sharded import ShardedTensor

N, FIRST = 7, 5  # of which the first process has so many entries


class Halves:
    """What two threads exchange."""

    def __init__(self) -> None:
        self._barrier, self._handed, self.sums = threading.Barrier(2, timeout=10), [None, None], [0, 0]

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._handed[rank] = value
        self._barrier.wait()
        every = list(self._handed)
        self._barrier.wait()
        self.sums[rank] += 1
        return every


class Half:
    def __init__(self, rank: int, halves: Halves) -> None:
        self.rank, self.halves, self.size = rank, halves, N

    def own(self, whole: Tensor) -> Tensor:
        return whole.split([FIRST, N - FIRST], -1)[self.rank]

    def join(self, own: Tensor) -> Tensor:
        return torch.cat(self.halves.exchange(self.rank, own), -1)

    def total(self, numbers: Tensor) -> Tensor:
        first, second = self.halves.exchange(self.rank, numbers)
        return first + second


def in_two(function: Callable[..., Any], *tensors: Tensor) -> tuple[list[Any], int]:
    """What a function of sharded tensors (..., N) returns, whole; and how many exchanges it took each."""
    halves = Halves()

    def of_rank(rank: int) -> Any:
        cut = Half(rank, halves)
        result = function(*[ShardedTensor(cut.own(t).clone(), cut) for t in tensors])
        sums = halves.sums[rank]
        results = result if isinstance(result, (list, tuple)) else [result]
        return [r.whole() if isinstance(r, ShardedTensor) else r for r in results], sums

    with ThreadPoolExecutor(2) as threads:
        (first, sums), (second, _) = threads.map(of_rank, range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    return first, sums


v, w, *rows = torch.randn(5, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
B, c = torch.stack(rows), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

SAME: dict[str, Callable[..., Any]] = {
    "entries": lambda v, w, B: torch.addcmul(v, w, v, value=2).lerp(w, 0.3) / 2 - v.clamp(min=0),
    "in place": lambda v, w, B: v.clone().add_(w, alpha=3).mul_(v[None][0]).copy_(w).sub_(v),
    "with a number": lambda v, w, B: (v @ w) * v + torch.tensor(2.0),
    "with a whole vector": lambda v, w, B: torch.arange(N) * v - B @ (0 * v).clone() @ c + w,
    "inner products": lambda v, w, B: [v @ w, v.norm(), B.norm(), v.sum(), v.mean(), *dots((v, w), (w, w))],
    "blocks": lambda v, w, B: [B @ v, B.mT @ c, B @ B.mT, (B * c[:, None]) @ w, B.mT @ (B @ w)],
    "rows": lambda v, w, B: [B[1], B[1:], B.unbind(0)[2], torch.stack([v, w]), torch.cat([B, B]), v.unsqueeze(0)],
    "columns": lambda v, w, B: [B.mT[:, 0], torch.stack([v, w]).mT @ c[:2], B.mT.sum(dim=1), B.sum(0), B.sum(1)],
    "judged": lambda v, w, B: [v.isfinite().all(), (v > 9).any(), (v / 0).isfinite().any(), (v > -9).all()],
    "new ones": lambda v, w, B: [v.new_zeros(2, N) @ w, torch.zeros_like(v) + 1, v.to(torch.float32), v.new_zeros(2)],
}

REFUSED: dict[str, Callable[..., Any]] = {
    "entries by place": lambda v, w, B: v[torch.tensor([0, 2])],
    "one entry": lambda v, w, B: v[3],
    "another order": lambda v, w, B: v.sort(),
    "a factorisation": lambda v, w, B: torch.linalg.qr(B.mT),
    "into a whole one": lambda v, w, B: torch.zeros(N, dtype=v.dtype).add_(v),
    "across": lambda v, w, B: v[:, None] * w[None],
    "outer products": lambda v, w, B: B.mT @ B,
    "drawn": lambda v, w, B: torch.randn_like(v),
}


@pytest.mark.parametrize("name", SAME)
def test_the_algebra_is_that_of_whole_vectors(name: str) -> None:
    expected = SAME[name](v, w, B)
    expected = expected if isinstance(expected, list) else [expected]
    for found, wanted in zip(in_two(SAME[name], v, w, B)[0], expected, strict=True):
        assert torch.allclose(torch.as_tensor(found).double(), torch.as_tensor(wanted).double(), rtol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_whole_vectors_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"sharded over processes.*Take the default solver"):
        in_two(REFUSED[name], v, w, B)


def test_inner_products_are_one_sum() -> None:
    assert in_two(lambda v, w, B: dots((v, w), (v, v), (w, w)), v, w, B)[1] == 1


def test_a_solver_works_on_them() -> None:
    d = torch.arange(1.0, N + 1, dtype=torch.float64)
    expected = gltr(DiagonalOperator(d), v, 0.5).solution
    (found,), _ = in_two(lambda v, d: gltr(Held(d), v, 0.5).solution, v, d)
    assert torch.allclose(found, expected, rtol=1e-10)


def test_lanczos_keeps_a_sharded_basis() -> None:
    d = torch.arange(1.0, N + 1, dtype=torch.float64)

    def basis(v: Any, d: Tensor) -> Tensor:
        found = lanczos(Held(d), v, 4).basis
        assert isinstance(found, ShardedTensor)
        return found

    assert torch.allclose(in_two(basis, v, d)[0][0], lanczos(DiagonalOperator(d), v, 4).basis)


class Held(DiagonalOperator):
    """A diagonal matrix on sharded vectors."""

    def held(self, vector: Tensor) -> Tensor:
        cut = self.diagonal._cut  # type: ignore[attr-defined]
        return ShardedTensor(cut.own(vector), cut)
