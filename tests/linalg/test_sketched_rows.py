"""Few rows of a Jacobian that are found in a sketch: against singular values, J itself and exact steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from imstep.curvature import ResidualJacobian
from imstep.curvature.gradient_rows import GradientRows, OuterRows, PlainRows, StackedRows
from imstep.linalg import ByShape, DenseRows, PivotedQR, RowMatrix, sketched_rows
from imstep.linalg.random_maps import sketch

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def graded(count: int, size: int, decades: float, entries: int | None = None) -> Tensor:
    """Singular values that fall by so many decades; rows of which so many entries are not zero."""
    own = size if entries is None else entries
    short = min(count, own)
    left, right = (torch.linalg.qr(normal(n, short, seed=k)).Q for k, n in enumerate((count, own)))
    rows = left * torch.logspace(0, -decades, short, dtype=F64) @ right.mT
    return torch.cat([rows, rows.new_zeros(count, size - own)], 1)


@pytest.mark.parametrize(("shape", "rank"), [((200, 1500), 200), ((1500, 900), 120)])
@pytest.mark.parametrize("tolerance", [1e-6, 1e-14, 1e-22])
def test_rows_leave_what_the_tolerance_allows(shape: tuple[int, int], rank: int, tolerance: float) -> None:
    """Squares of singular values fall by thirty decades, far below what rounding leaves of JJᵀ."""
    J = graded(*shape, decades=15, entries=None if rank == 200 else rank)
    found = sketched_rows(DenseRows(J), tolerance, most=rank)
    k = len(found.pivots)
    torch.testing.assert_close(found.basis.mT @ found.basis, torch.eye(k, dtype=F64), rtol=0, atol=1e-13)
    left = float((J - found.factor @ found.basis.mT).square().sum())
    assert found.remainder <= tolerance
    assert found.remainder == pytest.approx(left, rel=0.4)
    torch.testing.assert_close(found.factor, J @ found.basis, rtol=0, atol=2 * tolerance**0.5)
    # In the span of the rows themselves.
    rows = J[found.pivots]
    torch.testing.assert_close(rows @ found.basis @ found.basis.mT, rows, rtol=0, atol=1e-13)
    values = torch.logspace(0, -15, rank, dtype=F64).square()
    fewest = int((values.flip(0).cumsum(0).flip(0) > tolerance).sum())
    assert fewest <= k <= 1.3 * fewest + 16


def test_steps_are_those_of_all_rows() -> None:
    """Where λ is far below the rounding of JJᵀ: against singular values of J."""
    J = graded(150, 900, decades=12)
    residuals, damping = J @ normal(900, seed=5), 1e-20
    U, S, V = torch.linalg.svd(J, full_matrices=False)
    expected = -V.mT @ (S / (S.square() + damping) * (U.mT @ residuals))
    reduced = (space := PivotedQR(most=150).of(DenseRows(J), 1e-4 * damping, draw=3)).reduced
    step = space.vector(reduced.solve(residuals, torch.zeros(reduced.rank, dtype=F64), damping))
    assert reduced.kind == "rows"
    size = lambda d: float((J @ d).square().sum() + damping * d.square().sum()) ** 0.5
    assert size(step - expected) < 1e-4 * size(expected)
    assert space.project is not None
    torch.testing.assert_close(reduced.image(space.project(step)), J @ step, rtol=0, atol=1e-11)


def test_draws_follow_from_their_number() -> None:
    J = DenseRows(graded(200, 1500, decades=15))
    one, again, other = (sketched_rows(J, 1e-12, most=150, draw=draw).pivots for draw in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_ends_of_what_can_be_taken() -> None:
    rank_three = normal(200, 3) @ normal(3, 900, seed=1)
    found = sketched_rows(DenseRows(rank_three), 0.0, most=50)
    assert len(found.pivots) == 3
    torch.testing.assert_close(found.factor @ found.basis.mT, rank_three)
    nothing = sketched_rows(DenseRows(torch.zeros(5, 400, dtype=F64)), 0.0, most=5)
    assert (nothing.factor.shape, nothing.basis.shape, nothing.remainder) == ((5, 0), (400, 0), 0.0)
    assert sketched_rows(DenseRows(rank_three), 0.0, most=5).pivots.numel() == 3  # of fewer than a block
    assert sketched_rows(DenseRows(rank_three), 0.0, most=0).pivots.numel() == 0
    flat = sketched_rows(DenseRows(graded(200, 900, decades=0.1)), 1e-10, most=50)
    assert flat.remainder > 1e-10
    with pytest.raises(ValueError, match="tolerance"):
        sketched_rows(DenseRows(rank_three), -1.0, most=5)


def test_an_entry_that_nothing_depends_on_stays_where_it_is() -> None:
    J = graded(300, 1500, decades=12)
    J[:, [0, 7]] = 0
    space = PivotedQR(most=300).of(DenseRows(J), 1e-20, draw=0)
    step = space.vector(space.reduced.solve(normal(300), torch.zeros(space.reduced.rank, dtype=F64), 1e-8))
    assert space.reduced.kind == "rows"
    assert not bool(step[[0, 7]].any())
    assert int((step != 0).sum()) == 1498


@pytest.mark.parametrize(("decades", "kind"), [(45, "rows"), (60, "rows"), (1, "dense")])
def test_few_rows_are_chosen_where_few_columns_do_above_rounding(decades: float, kind: str) -> None:
    J = graded(300, 1500, decades=decades)
    tolerance = 1e-15 * float(J.square().sum())
    assert ByShape(large=0).of(DenseRows(J), tolerance, draw=0).reduced.kind == kind


def test_rows_of_an_exact_rank_are_few() -> None:
    """Columns leave nothing, or rounding; so do rows, as many as J has directions and hardly more."""
    for rows in (
        normal(300, 3) @ normal(3, 1500, seed=1),
        torch.eye(300, 1500, dtype=F64) * (torch.arange(300) < 3)[:, None],
    ):
        space = ByShape(large=0).of(DenseRows(rows), 1e-20 * float(rows.square().sum()), draw=0)
        u = space.reduced.solve(rows.sum(1), torch.zeros(space.reduced.rank, dtype=F64), 1e-12)
        torch.testing.assert_close(rows @ space.vector(u), -rows.sum(1), rtol=1e-6, atol=1e-8)


PARTS: list[Callable[[], GradientRows]] = [
    lambda: PlainRows(normal(4, 30)),
    lambda: PlainRows(normal(4, 700)),
    lambda: OuterRows(normal(3, 4, 5), normal(3, 4, 7, seed=1)),
    lambda: StackedRows([OuterRows(normal(1, 4, 5), normal(1, 4, 7, seed=1)), PlainRows(normal(4, 35, seed=2))], 35),
]


@pytest.mark.parametrize("make", PARTS)
@pytest.mark.parametrize("width", [64, 101])
def test_sketches_keep_inner_products_on_average(make: Callable[[], GradientRows], width: int) -> None:
    """E B Ω Ωᵀ Bᵀ = B Bᵀ: the mean of 400 draws within five of its deviations, entry by entry."""
    part = make()
    B = part.written_out()
    found = []
    for seed in range(400):
        image = part.sketched(width, torch.Generator().manual_seed(seed))
        assert image.shape == (4, width)
        found.append(image @ image.mT)
    samples = torch.stack(found)
    deviation = samples.std(0) / 20
    assert bool(((samples.mean(0) - B @ B.mT).abs() <= 5 * deviation + 1e-12).all())
    assert bool((deviation < 0.05 * (B @ B.mT).diagonal().max()).all())


def test_a_sketch_of_a_network_keeps_the_rank_of_its_rows() -> None:
    """Of all parts at once, one of them without rows: singular values of sketch and J, up to what a sketch distorts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    unused = nn.Parameter(torch.zeros(3, dtype=F64))
    x = normal(300, 2)
    J: RowMatrix = ResidualJacobian(lambda: net(x).square().mean(), [*net.parameters(), unused])
    values = torch.linalg.svdvals(J.written_out())
    found = torch.linalg.svdvals(J.sketched(240, torch.Generator().manual_seed(0)))
    kept = values > 1e-9 * values[0]
    assert 40 < int(kept.sum()) < 160
    ratio = found[: len(kept)][kept[: len(found)]] / values[kept]
    assert 0.1 < ratio.min().item() < ratio.max().item() < 2
    assert sketch(torch.zeros(0, 5, dtype=F64), 7, torch.Generator()).shape == (0, 7)
