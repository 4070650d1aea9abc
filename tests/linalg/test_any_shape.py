"""Factorisations of Jacobians of any shape: against dense algebra in longer arithmetic, and the choice among them."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor

from imstep.linalg import (
    BlockQR,
    ByShape,
    DenseFactorisation,
    DenseRows,
    Factorisation,
    PivotedCholesky,
    ScaledRows,
    SketchedFactorisation,
    ThinFactorisation,
    TriangularLeastSquares,
    partial_cholesky,
)
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


def test_triangular_problem_beside_the_normal_equations() -> None:
    """From other coordinates than zero, with other damping, its image and its dual norm; an entry without effect."""
    J, residuals, u, g = normal(30, 12), normal(30, seed=1), normal(12, seed=2), normal(12, seed=3)
    J[:, 4] = g[4] = 0
    problem = TriangularLeastSquares(BlockQR([J]))
    for damping in (0.3, 1e-6):
        matrix = J.mT @ J + damping * torch.eye(12, dtype=F64)
        expected = -torch.linalg.solve(matrix, J.mT @ residuals + damping * u)
        expected[4] = 0
        torch.testing.assert_close(problem.solve(residuals, u, damping), expected)
        torch.testing.assert_close(problem.dual_norm(g, damping), float(g @ torch.linalg.solve(matrix, g)) ** 0.5)
    torch.testing.assert_close(problem.image(u), J @ u)


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
    "make", [lambda: ThinFactorisation(values=-1), lambda: SketchedFactorisation(columns=0), lambda: ByShape(memory=-1)]
)
def test_numbers_out_of_range(make: type[Factorisation]) -> None:
    with pytest.raises(ValueError, match="at least"):
        make()
