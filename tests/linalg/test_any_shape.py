"""Factorisations of Jacobians of any shape: against dense algebra in longer arithmetic, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from imstep.linalg import (
    BlockQR,
    ByShape,
    DampedLeastSquares,
    DenseFactorisation,
    DenseRows,
    Factorisation,
    NormalEquations,
    NormalLeastSquares,
    PivotedCholesky,
    PivotedQR,
    ScaledRows,
    SketchedFactorisation,
    ThinFactorisation,
    TriangularLeastSquares,
    partial_cholesky,
    partial_qr,
)
from imstep.linalg.gram_factor import LEAST
from imstep.linalg.triangular import DampedQR

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def graded(count: int, size: int, decades: float, seed: int = 0) -> Tensor:
    """Singular values that fall by so many decades."""
    short = min(count, size)
    left, right = (torch.linalg.qr(normal(n, short, seed=seed + k)).Q for k, n in enumerate((count, size)))
    return left * torch.logspace(0, -decades, short, dtype=F64) @ right.mT


def step_of(factorisation: Factorisation, J: Tensor, residuals: Tensor, damping: float) -> Tensor:
    space = factorisation.of(DenseRows(J), 0.0, draw=0)
    return space.vector(space.reduced.solve(residuals, torch.zeros(space.reduced.rank, dtype=F64), damping))


def exact_step(J: Tensor, residuals: Tensor, damping: float) -> Tensor:
    """By the normal equations, in 60 digits."""
    with mpmath.workdps(60):
        matrix, right = mpmath.matrix(J.tolist()), mpmath.matrix(residuals.tolist())
        normal_matrix = matrix.T * matrix + mpmath.mpf(damping) * mpmath.eye(J.shape[1])
        return -torch.tensor([float(v) for v in mpmath.lu_solve(normal_matrix, matrix.T * right)], dtype=F64)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (25, 25)])
@pytest.mark.parametrize("damping", [1e-2, 1e-12, 1e-20])
def test_thin_factors_are_accurate_to_the_condition(shape: tuple[int, int], damping: float) -> None:
    """J of condition 1e7: its square is beyond double precision, and so are the normal equations."""
    J = graded(*shape, decades=7)
    residuals = J @ normal(shape[1], seed=5)
    expected = exact_step(J, residuals, damping)
    for values in (0, 100):
        found = step_of(ThinFactorisation(values=values), J, residuals, damping)
        assert (found - expected).norm() < 1e-7 * expected.norm()
    if damping == 1e-20:
        assert (step_of(DenseFactorisation(), J, residuals, damping) - expected).norm() > 1e-5 * expected.norm()


@pytest.mark.parametrize("rows", [(30,), (12, 12, 6), (20, 1, 9)])
def test_blocks_of_rows_have_the_factors_of_the_whole(rows: tuple[int, ...]) -> None:
    J, v, u = normal(30, 12), normal(30, seed=1), normal(12, seed=2)
    qr = BlockQR(J.split(rows))
    Q = torch.stack([qr.lift(e) for e in torch.eye(12, dtype=F64)], 1)
    torch.testing.assert_close(Q @ qr.triangle, J)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(12, dtype=F64))
    torch.testing.assert_close(qr.project(v), Q.mT @ v)
    torch.testing.assert_close(qr.lift(u), Q @ u)


@pytest.mark.parametrize("size", [1, 64, 150])
def test_a_damped_triangle_by_panels(size: int) -> None:
    """R'ᵀR' = RᵀR + λI, Qᵀ takes its columns to those of R', and R stays as it was."""
    R, root, v, w = graded(size, size, decades=5).triu(), 0.3, normal(size, seed=1), normal(size, seed=2)
    given = R.mT.contiguous().mT  # as LAPACK returns it
    damped = DampedQR(given, root)
    assert torch.equal(given, R)
    assert torch.equal(damped.triangle, damped.triangle.triu())
    torch.testing.assert_close(damped.triangle.mT @ damped.triangle, R.mT @ R + root**2 * torch.eye(size, dtype=F64))
    image = damped.project(R @ v, root * v)
    torch.testing.assert_close(image, damped.triangle @ v)
    torch.testing.assert_close(damped.triangle.mT @ damped.project(v, w), R.mT @ v + root * w)


@pytest.mark.parametrize(
    "made", [lambda J: TriangularLeastSquares(BlockQR([J])), lambda J: NormalLeastSquares(DenseRows(J))]
)
def test_problems_whose_coordinates_are_steps(made: Callable[[Tensor], DampedLeastSquares]) -> None:
    """From other coordinates than zero, with other damping, its image and its dual norm; an entry without effect."""
    J, residuals, u, g = normal(30, 12), normal(30, seed=1), normal(12, seed=2), normal(12, seed=3)
    J[:, 4] = g[4] = u[4] = 0
    problem = made(J)
    for damping in (0.3, 1e-6):
        matrix = J.mT @ J + damping * torch.eye(12, dtype=F64)
        expected = -torch.linalg.solve(matrix, J.mT @ residuals + damping * u)
        found = problem.solve(residuals, u, damping)
        torch.testing.assert_close(found, expected)
        assert found[4] == 0
        torch.testing.assert_close(problem.dual_norm(g, damping), float(g @ torch.linalg.solve(matrix, g)) ** 0.5)
    torch.testing.assert_close(problem.image(u), J @ u)


@pytest.mark.parametrize("blocks", [None, 2000])
def test_normal_equations_where_damping_is_hardly_above_their_rounding(
    blocks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far down as they are chosen, a step is right to a hundredth, and corrections take up what it lacks."""
    if blocks is not None:
        monkeypatch.setattr("imstep.linalg.normal.BLOCK", blocks)
    J = graded(60, 40, decades=9)
    residuals, damping = J @ normal(40, seed=5), LEAST * float(J.square().sum())
    expected = exact_step(J, residuals, damping)
    space = NormalEquations().of(DenseRows(J), damping, draw=0)
    u = space.reduced.solve(residuals, torch.zeros(40, dtype=F64), damping)
    assert (space.vector(u) - expected).norm() < 1e-2 * expected.norm()
    for _ in range(3):
        u = u + space.reduced.solve(residuals + space.reduced.image(u), u, damping)
    assert (space.vector(u) - expected).norm() < 1e-7 * expected.norm()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
def test_sketched_steps(shape: tuple[int, int], damping: float) -> None:
    """Corrections from where the last has led come to the step of dense algebra, though the columns are too few."""
    J, residuals = graded(*shape, decades=5), normal(shape[0], seed=7)
    expected = J @ step_of(ThinFactorisation(), J, residuals, damping)
    reduced = SketchedFactorisation(columns=60).of(DenseRows(J), 0.0, draw=0).reduced
    u, errors = torch.zeros(shape[1], dtype=F64), []
    for _ in range(4):
        u = u + reduced.solve(residuals + J @ u, u, damping)
        errors.append(float((J @ u - expected).norm() / expected.norm()))
    assert errors[0] < 3e-2
    assert errors[3] < 1e-5
    torch.testing.assert_close(reduced.image(u), J @ u)


KINDS = [
    ((500, 20), 1e-6, ByShape(), "singular values"),
    ((500, 200), 1e-1, ByShape(), "columns"),
    ((500, 200), 1e-3, ByShape(), "normal"),
    ((500, 200), 1e-20, ByShape(), "triangular"),
    ((200, 500), 1e-20, ByShape(), "dense"),
    ((500, 200), 1e-20, ByShape(memory=10**6), "sketch"),
    ((200, 500), 1e-20, ByShape(memory=10**5), "sketch"),
    ((500, 200), 1e-1, ByShape(memory=10**5), "columns"),
    ((500, 200), 1e-1, ByShape(wide=DenseFactorisation()), "dense"),
    ((500, 200), 1e-20, ThinFactorisation(), "triangular"),
    ((500, 200), 1e-20, PivotedCholesky(), "dense"),
]


@pytest.mark.parametrize(("shape", "tolerance", "way", "kind"), KINDS)
def test_the_choice(shape: tuple[int, int], tolerance: float, way: Factorisation, kind: str) -> None:
    J = graded(*shape, decades=12) if kind == "columns" else normal(*shape)
    assert way.of(DenseRows(J), tolerance, draw=0).reduced.kind == kind


def test_columns_that_only_scale_have_the_same_steps() -> None:
    J = normal(30, 12)
    units = torch.logspace(-4, 4, 12, dtype=F64)
    scaled = ScaledRows(DenseRows(J * units), DenseRows(J * units).column_norms())
    plain = ScaledRows(DenseRows(J), DenseRows(J).column_norms())
    torch.testing.assert_close(scaled.written_out(), plain.written_out())
    torch.testing.assert_close(scaled.column_norms(), torch.ones(12, dtype=F64))
    torch.testing.assert_close(scaled.squared_norm(), 12.0)
    v, u, index = normal(12, seed=2), normal(30, seed=3), torch.tensor([4, 1])
    torch.testing.assert_close(scaled @ v, plain.written_out() @ v)
    torch.testing.assert_close(scaled.T @ u, plain.written_out().mT @ u)
    torch.testing.assert_close(scaled.rows(index).written_out(), plain.written_out()[index])
    found = partial_cholesky(scaled.gram(), 0.0)
    torch.testing.assert_close(found.factor @ found.factor.mT, plain.gram().dense())
    assert [block.shape for block in DenseRows(J).blocks(12 * 13)] == [(15, 12), (15, 12)]
    torch.testing.assert_close(torch.cat(list(DenseRows(J).blocks(12 * 13))), J)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ThinFactorisation(values=-1),
        lambda: SketchedFactorisation(columns=0),
        lambda: ByShape(memory=-1),
        lambda: PivotedQR(most=-1),
    ],
)
def test_numbers_out_of_range(make: type[Factorisation]) -> None:
    with pytest.raises(ValueError, match="at least"):
        make()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("tolerance", [1e-6, 1e-14, 1e-22, 1e-27])
def test_rows_leave_what_the_tolerance_allows(shape: tuple[int, int], tolerance: float) -> None:
    """Singular values fall by 15 decades, their squares by twice as many; what is left is told to their precision."""
    J = graded(*shape, decades=15)
    found = partial_qr(J, tolerance)
    identity = torch.eye(found.basis.shape[1], dtype=F64)
    torch.testing.assert_close(found.basis.mT @ found.basis, identity, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.factor, J @ found.basis, rtol=0, atol=1e-14)
    left = float((J - found.factor @ found.basis.mT).square().sum())
    assert found.remainder == pytest.approx(left, rel=1e-2, abs=1e-30)
    assert left <= tolerance
    # Not many more than the fewest that could do.
    values = torch.logspace(0, -15, min(shape), dtype=F64).square()
    fewest = int((values.flip(0).cumsum(0).flip(0) > tolerance).sum())
    assert fewest <= found.basis.shape[1] <= 1.4 * fewest + 48


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("damping", [1e-4, 1e-12, 1e-16])
def test_steps_by_few_rows(shape: tuple[int, int], damping: float) -> None:
    """In the span of as many rows as λ needs a step is that of longer arithmetic, also where JJᵀ would be rounding."""
    J = graded(*shape, decades=11)
    residuals = J @ normal(shape[1], seed=5)
    space = PivotedQR(most=60).of(DenseRows(J), 1e-6 * damping, draw=0)
    reduced = space.reduced
    zeros = torch.zeros(reduced.rank, dtype=F64)
    u = reduced.solve(residuals, zeros, damping)
    expected = exact_step(J, residuals, damping)
    assert reduced.kind == "rows"
    assert float((space.vector(u) - expected).norm()) < 2e-3 * float(expected.norm())
    torch.testing.assert_close(reduced.image(u), J @ space.vector(u), rtol=1e-6, atol=1e-12)
    assert space.project is not None
    torch.testing.assert_close(space.project(space.vector(u)), u)
    g = J.mT @ residuals
    matrix = J.mT @ J + damping * torch.eye(shape[1], dtype=F64)
    if damping == 1e-4:
        torch.testing.assert_close(reduced.dual_norm(g, damping), float(g @ torch.linalg.solve(matrix, g)) ** 0.5)


def test_rows_end_where_nothing_is_left() -> None:
    rank_three = normal(200, 3) @ normal(3, 100, seed=1)
    found = partial_qr(rank_three, 0.0)
    assert found.basis.shape[1] == 3
    torch.testing.assert_close(found.factor @ found.basis.mT, rank_three)
    nothing = partial_qr(torch.zeros(5, 4, dtype=F64), 0.0)
    assert (nothing.factor.shape, nothing.basis.shape, nothing.remainder) == ((5, 0), (4, 0), 0.0)


def test_an_entry_that_nothing_depends_on_stays_where_it_is() -> None:
    J = graded(300, 200, decades=12)
    J[:, [0, 7]] = 0
    space = PivotedQR(most=200).of(DenseRows(J), 1e-20, draw=0)
    step = space.vector(space.reduced.solve(normal(300), torch.zeros(space.reduced.rank, dtype=F64), 1e-8))
    assert not bool(step[[0, 7]].any())
    assert int((step != 0).sum()) == 198


@pytest.mark.parametrize(
    ("shape", "decades", "bounds", "kind"),
    [
        ((400, 300), 20, {"large": 0}, "rows"),
        ((300, 400), 60, {"large": 0}, "rows"),
        ((400, 300), 20, {}, "triangular"),  # small, so that all of J takes no time
        ((400, 300), 0.1, {"large": 0}, "triangular"),  # of which few rows say little
        ((300, 400), 0.1, {"large": 0}, "dense"),
        ((130, 400), 20, {"large": 0}, "dense"),  # where few rows would be too few to be worth it
        ((300, 400), 20, {"large": 0, "memory": 10**6}, "sketch"),  # J does not fit
    ],
)
def test_where_few_rows_are_chosen(shape: tuple[int, int], decades: float, bounds: dict[str, int], kind: str) -> None:
    J = graded(*shape, decades=decades)
    tolerance = 1e-15 * float(J.square().sum())
    assert ByShape(**bounds).of(DenseRows(J), tolerance, draw=0).reduced.kind == kind
