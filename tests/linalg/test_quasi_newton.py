"""Updates of inverse Hessians against their formulas for the Hessian itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imstep.linalg import (
    BlockBFGSPreconditioner,
    DiagonalOperator,
    RankOneOperator,
    bfgs_update,
    self_scaled_update,
    sr1_update,
)

F64 = torch.float64


@pytest.fixture
def start(with_spectrum, normal) -> tuple[Tensor, Tensor, Tensor]:
    """H, s and y = A s."""
    matrix, _ = with_spectrum(torch.logspace(-1, 1, 6, dtype=F64))
    other, _ = with_spectrum(torch.logspace(0.5, -0.5, 6, dtype=F64), seed=3)
    s = normal(6)
    return other, s, matrix @ s


def direct_bfgs(B: Tensor, s: Tensor, y: Tensor) -> Tensor:
    return B - torch.outer(B @ s, B @ s) / (s @ B @ s) + torch.outer(y, y) / (y @ s)


def test_bfgs_is_the_inverse_of_the_direct_update(start: tuple[Tensor, Tensor, Tensor]) -> None:
    H, s, y = start
    torch.testing.assert_close(bfgs_update(H, s, y), torch.linalg.inv(direct_bfgs(torch.linalg.inv(H), s, y)))


def test_sr1_is_the_inverse_of_the_direct_update(start: tuple[Tensor, Tensor, Tensor]) -> None:
    H, s, y = start
    B = torch.linalg.inv(H)
    v = y - B @ s
    torch.testing.assert_close(sr1_update(H, s, y), torch.linalg.inv(B + torch.outer(v, v) / (v @ s)))
    torch.testing.assert_close(sr1_update(H, s, -y) @ -y, s)


def test_sr1_finds_the_inverse_of_a_quadratic_in_n_steps(with_spectrum, normal) -> None:
    """Nocedal and Wright, Theorem 6.1; also of an indefinite one."""
    matrix, _ = with_spectrum(torch.tensor([-2.0, -1.0, 0.5, 1.0, 3.0, 10.0], dtype=F64))
    H = torch.eye(6, dtype=F64)
    for seed in range(6):
        s = normal(6, seed=seed)
        H = sr1_update(H, s, matrix @ s)
    torch.testing.assert_close(H, torch.linalg.inv(matrix), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("theta", [None, 0.0, 0.5, 1.0])
def test_self_scaled_update_is_that_of_the_scaled_hessian(
    start: tuple[Tensor, Tensor, Tensor], factor: float, theta: float | None
) -> None:
    """B <- τ(B - B s sᵀB / sᵀBs + θ w wᵀ) + y yᵀ/yᵀs, w = (sᵀBs)^(1/2) (y/yᵀs - B s/sᵀBs), after Al-Baali."""
    H, s, y = start
    H = factor * H
    B = torch.linalg.inv(H)
    b, h = float(s @ B @ s / (y @ s)), float(y @ H @ y / (y @ s))
    a = b * h - 1
    c = math.sqrt(a / (1 + a))
    rho = min(1, h * (1 - c))
    chosen = max((rho - 1) / a, min(1 / rho, (1 - b) / b)) if theta is None else theta
    sigma = 1 + chosen * a
    if chosen > 0:
        tau = min(1, 1 / b) * min(sigma ** (1 / (1 - 6)), 1 / chosen)
    else:
        tau = min(min(1, 1 / b) * sigma ** (1 / (1 - 6)), sigma)
    w = (s @ B @ s).sqrt() * (y / (y @ s) - B @ s / (s @ B @ s))
    direct = tau * (B - torch.outer(B @ s, B @ s) / (s @ B @ s) + chosen * torch.outer(w, w))
    direct += torch.outer(y, y) / (y @ s)
    made = self_scaled_update(H, s, y, B @ s, theta)
    torch.testing.assert_close(made, torch.linalg.inv(direct), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(made @ y, s)
    assert torch.linalg.eigvalsh(made)[0] > 0


@pytest.mark.parametrize("n", [1, 4])
def test_where_s_and_y_are_parallel_to_the_model(n: int) -> None:
    """a = 0: the update is exact along s, and finite."""
    s = torch.ones(n, dtype=F64)
    for y in (0.3 * s, s, 7 * s):
        made = self_scaled_update(torch.eye(n, dtype=F64), s, y, s)
        assert made.isfinite().all()
        torch.testing.assert_close(made @ y, s)


@pytest.mark.parametrize("change", [-1.0, 0.0, math.nan])
def test_without_positive_curvature_nothing_changes(change: float) -> None:
    H, s = torch.eye(3, dtype=F64), torch.ones(3, dtype=F64)
    y = change * s
    assert bfgs_update(H, s, y) is H
    assert self_scaled_update(H, s, y, s) is H


def test_an_indefinite_matrix_is_begun_anew() -> None:
    s, y = torch.ones(2, dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    made = self_scaled_update(-torch.eye(2, dtype=F64), s, y, -s)
    torch.testing.assert_close(made, 0.4 * torch.eye(2, dtype=F64))


def test_the_compact_form_is_that_of_updates_one_by_one() -> None:
    """Nocedal and Wright, (6.24), from γI; the length of a pair does not count."""
    generator = torch.Generator().manual_seed(3)
    pairs = [tuple(torch.randn(2, 9, generator=generator, dtype=F64)) for _ in range(4)]
    B = -1.7 * torch.eye(9, dtype=F64)
    for s, y in pairs:
        rest = y - B @ s
        B = B + torch.outer(rest, rest) / (rest @ s)
    compact = RankOneOperator([(1e-9**i * s, 1e-9**i * y) for i, (s, y) in enumerate(pairs)], gamma=-1.7)
    torch.testing.assert_close(compact.to_dense(), B, rtol=1e-9, atol=1e-9)


def test_a_rank_one_matrix_finds_an_indefinite_one_by_as_many_pairs_as_it_has_dimensions() -> None:
    """Nocedal and Wright, Theorem 6.1; pairs given twice, and one that says nothing new, do no harm."""
    generator = torch.Generator().manual_seed(4)
    A = torch.randn(6, 6, generator=generator, dtype=F64)
    A = A + A.mT
    steps = list(torch.randn(6, 6, generator=generator, dtype=F64))
    pairs = [(s, A @ s) for s in [*steps, steps[2], steps[0] - steps[5]]]
    assert float(torch.linalg.eigvalsh(A)[0]) < 0
    torch.testing.assert_close(RankOneOperator(pairs, gamma=0.3).to_dense(), A, rtol=1e-8, atol=1e-8)
    agreeing = RankOneOperator([(steps[0], 0.3 * steps[0])], gamma=0.3)  # γI says so already
    torch.testing.assert_close(agreeing.to_dense(), 0.3 * torch.eye(6, dtype=F64))
    with pytest.raises(ValueError, match="at least one pair"):
        RankOneOperator([], gamma=1.0)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_block_updates_are_the_formula_s(damping: float) -> None:
    """Gower, Goldfarb and Richtárik, (8), with matrices; a block of negative curvature is left out."""
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)
    root, start = draw(7, 7), draw(7).square() + 0.1
    A = root @ root.mT / 7 + 0.1 * torch.eye(7, dtype=F64)
    blocks = [(S, A @ S) for S in (draw(7, 2), draw(7, 3), draw(7, 1))]
    P, identity = start.diag(), torch.eye(7, dtype=F64)
    for S, image in blocks:
        Y = image + damping * S
        inner = S @ torch.linalg.inv(S.mT @ Y)
        P = inner @ S.mT + (identity - inner @ Y.mT) @ P @ (identity - Y @ inner.mT)
    bad = draw(7, 2)
    made = BlockBFGSPreconditioner(DiagonalOperator(start), [*blocks[:1], (bad, -A @ bad), *blocks[1:]], damping)
    assert len(made) == 3
    torch.testing.assert_close(made.to_dense(), P, rtol=1e-9, atol=1e-9)
    S, image = blocks[-1]
    torch.testing.assert_close(made.matmat(image + damping * S), S)
