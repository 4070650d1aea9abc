"""Randomised Nyström approximation: the definition, error bounds, float32, and what it does to solves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg_cases import Counted

from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    NystromApproximation,
    RelativeResidual,
    adaptive_nystrom,
    conjugate_gradient,
    minres,
    nystrom,
)

F64 = torch.float64
DECAYING = torch.logspace(2, -4, 120)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix_of(approximation):
    U, values = approximation.vectors.double(), approximation.values.double()
    return (U * values) @ U.T


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rank", [1, 10, 40])
def test_the_approximation_is_its_definition(with_spectrum, dtype, rank):
    """A Ω (Ωᵀ A Ω)⁺ (A Ω)ᵀ with the same Ω, in float64."""
    matrix, _ = with_spectrum(DECAYING)
    operator = Counted(matrix.to(dtype))
    approximation = nystrom(operator, rank, generator=seeded())
    test = torch.linalg.qr(torch.randn(120, rank, generator=seeded(), dtype=dtype))[0].double()
    images = matrix @ test
    expected = images @ torch.linalg.pinv(test.T @ images, hermitian=True, rtol=1e-14) @ images.T
    level = 100 * math.sqrt(120) * torch.finfo(dtype).eps * 100
    torch.testing.assert_close(matrix_of(approximation), expected, rtol=0, atol=level)
    U = approximation.vectors.double()
    torch.testing.assert_close(U.T @ U, torch.eye(rank, dtype=F64), rtol=0, atol=50 * torch.finfo(dtype).eps)
    assert approximation.values.tolist() == sorted(approximation.values.tolist(), reverse=True)
    assert approximation.values.min() >= 0
    assert approximation.products == operator.products == approximation.rank == rank


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_within_the_expectation(with_spectrum, seed):
    """E‖A - Â‖ <= min over p of (1 + (r - p) / (p - 1)) σ_{r-p+1} + ...: well within 10 σ_{r/2} (Proposition 2.2)."""
    matrix, _ = with_spectrum(DECAYING, seed)
    values = DECAYING.double()
    for rank in (10, 30, 60):
        approximation = nystrom(DenseOperator(matrix), rank, generator=seeded(seed))
        error = matrix - matrix_of(approximation)
        assert torch.linalg.matrix_norm(error, ord=2) <= 10 * values[rank // 2]
        assert torch.linalg.eigvalsh(error)[0] >= -1e-10  # Â is below A
        assert approximation.values[0].item() == pytest.approx(values[0].item(), rel=0.3)


def test_a_matrix_of_low_rank_is_recovered(with_spectrum):
    matrix, _ = with_spectrum(torch.cat([torch.tensor([5.0, 3.0, 1.0]), torch.zeros(40)]))
    approximation = nystrom(DenseOperator(matrix), 6, generator=seeded())
    torch.testing.assert_close(matrix_of(approximation), matrix, rtol=0, atol=1e-12)
    nothing = nystrom(DenseOperator(torch.zeros(5, 5)), 2, generator=seeded())
    assert nothing.values.tolist() == [0.0, 0.0]
    torch.testing.assert_close(nothing.preconditioner(0.0) @ torch.ones(5), torch.ones(5))
    everything = nystrom(DenseOperator(matrix[:3, :3] @ matrix[:3, :3]), 10, generator=seeded())
    assert (everything.rank, everything.products) == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_the_preconditioner_is_positive_definite_and_nearly_the_inverse(with_spectrum, dtype, damping):
    matrix, _ = with_spectrum(torch.logspace(4, -8, 100))  # far more than float32 resolves
    approximation = nystrom(DenseOperator(matrix.to(dtype)), 60, generator=seeded())
    P = approximation.preconditioner(damping).to_dense().double()
    assert (P - P.T).abs().max() <= 1e-4 * P.abs().max()
    values = torch.linalg.eigvalsh((P + P.T) / 2)
    assert values[0] > 0
    preconditioned = torch.linalg.eigvals(P @ (matrix + damping * torch.eye(100, dtype=F64))).real
    plain = torch.linalg.eigvalsh(matrix + damping * torch.eye(100, dtype=F64))
    assert preconditioned.max() / preconditioned.min() < 1e-3 * plain.max() / plain.min()


def test_the_preconditioner_is_its_formula(normal):
    U = torch.linalg.qr(torch.randn(20, 4, generator=seeded(), dtype=F64))[0]
    values = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=F64)
    P = NystromApproximation(U, values).preconditioner(0.5)
    expected = (U / (values + 0.5)) @ U.T + (torch.eye(20, dtype=F64) - U @ U.T) / 1.5
    torch.testing.assert_close(P.to_dense(), expected)
    torch.testing.assert_close(P @ normal(20), expected @ normal(20))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("solve", [conjugate_gradient, minres])
def test_solutions_agree_and_come_faster(with_spectrum, normal, dtype, solve):
    matrix, _ = with_spectrum(torch.cat([torch.logspace(4, 0, 30), torch.linspace(0.9, 1.0, 170)]))
    operator, rhs = DenseOperator(matrix.to(dtype)), normal(200).to(dtype)
    P = nystrom(operator, 60, generator=seeded()).preconditioner(0.1)
    stopping = [RelativeResidual(1e-5)]
    plain, faster = (solve(operator, rhs, damping=0.1, preconditioner=p, stopping=stopping) for p in (None, P))
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(200, dtype=F64), normal(200))
    for result in (plain, faster):
        assert result.status is KrylovStatus.CONVERGED
        torch.testing.assert_close(result.solution.double(), expected, rtol=0, atol=1e-3)
    assert faster.products < plain.products / 3


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_negative_eigenvalues_are_survived(with_spectrum, normal, dtype):
    matrix, _ = with_spectrum(torch.cat([torch.logspace(3, 0, 60), -torch.logspace(1, 0, 20)]))
    operator = DenseOperator(matrix.to(dtype))
    approximation = nystrom(operator, 40, generator=seeded())
    assert (approximation.values >= 0).all()
    P = approximation.preconditioner(0.1)
    assert torch.linalg.eigvalsh(P.to_dense().double())[0] > 0
    plain, faster = (minres(operator, normal(80).to(dtype), preconditioner=p) for p in (None, P))
    assert plain.status is faster.status is KrylovStatus.CONVERGED
    assert faster.products < plain.products


def test_the_rank_adapts_to_the_damping():
    values = torch.logspace(3, -4, 300, dtype=F64)
    ranks = []
    for damping in (1e3, 20.0, 2.0, 0.5, 0.0):
        operator = Counted(torch.diag(values))
        approximation = adaptive_nystrom(operator, damping, generator=seeded(), largest=100)
        ranks.append(approximation.rank)
        assert approximation.products == operator.products == approximation.rank
        assert approximation.values[-1] <= 10 * damping or approximation.rank == 100
        again = adaptive_nystrom(operator, damping, generator=seeded(), largest=100)
        assert again.vectors.equal(approximation.vectors)
        error = torch.linalg.matrix_norm(torch.diag(values) - matrix_of(approximation), ord=2)
        assert error <= 10 * values[approximation.rank // 2]
    assert ranks == [8, 16, 64, 100, 100]


def test_a_small_matrix_is_exhausted(with_spectrum):
    matrix, _ = with_spectrum([3.0, 2.0, 1.0])
    approximation = adaptive_nystrom(DenseOperator(matrix), 0.0, generator=seeded(), rank=2)
    assert approximation.rank == 3
    torch.testing.assert_close(matrix_of(approximation), matrix)


def test_products_that_are_not_finite_show_in_the_values():
    for approximation in (
        nystrom(DiagonalOperator(torch.tensor([1.0, math.nan, 2.0])), 2, generator=seeded()),
        adaptive_nystrom(DiagonalOperator(torch.full((30,), math.inf)), 1.0, generator=seeded()),
    ):
        assert approximation.values.isnan().all()
        result = conjugate_gradient(
            DenseOperator(torch.eye(len(approximation.vectors))),
            torch.ones(len(approximation.vectors)),
            preconditioner=approximation.preconditioner(0.1),
        )
        assert result.status is KrylovStatus.NON_FINITE


@pytest.mark.parametrize(
    "call",
    [
        lambda A, g: nystrom(A, 0, generator=g),
        lambda A, g: adaptive_nystrom(A, -1.0, generator=g),
        lambda A, g: adaptive_nystrom(A, 1.0, generator=g, rank=0),
        lambda A, g: adaptive_nystrom(A, 1.0, generator=g, rank=9, largest=8),
        lambda A, g: adaptive_nystrom(A, 1.0, generator=g, ratio=0.0),
        lambda A, g: nystrom(A, 1, generator=g).preconditioner(-1.0),
    ],
)
def test_misuse_is_explained(call):
    with pytest.raises(ValueError, match="got"):
        call(DenseOperator(torch.eye(3)), seeded())


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 30),
    rank=st.integers(1, 30),
    seed=st.integers(0, 10_000),
    spread=st.floats(0, 12),
    damping=st.floats(0, 10),
    dtype=st.sampled_from([torch.float32, F64]),
)
def test_any_preconditioner_is_positive_definite(n, rank, seed, spread, damping, dtype):
    values = torch.logspace(0, -spread, n, dtype=F64)
    vectors = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=F64))[0]
    matrix = (vectors * values) @ vectors.T
    approximation = nystrom(DenseOperator(matrix.to(dtype)), rank, generator=seeded(seed))
    P = approximation.preconditioner(damping)
    for vector in (
        torch.randn(n, generator=seeded(seed), dtype=dtype),
        vectors[:, 0].to(dtype),
        vectors[:, -1].to(dtype),
    ):
        assert (vector @ (P @ vector)).item() > 0
    error = torch.linalg.eigvalsh(matrix - matrix_of(approximation))
    assert error[0] >= -1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("unit", [2.0**-90, 2.0**90])
def test_units_whose_squares_leave_the_range_of_single_precision_change_nothing(with_spectrum, unit):
    matrix, _ = with_spectrum(DECAYING)
    one, other = (nystrom(DenseOperator(u * matrix.float()), 10, generator=seeded()) for u in (1, unit))
    torch.testing.assert_close(other.values / unit, one.values, rtol=1e-4, atol=0)
    assert float(one.values[0]) > 50
    adaptive = adaptive_nystrom(DenseOperator(unit * matrix.float()), unit, generator=seeded())
    assert adaptive.rank == adaptive_nystrom(DenseOperator(matrix.float()), 1.0, generator=seeded()).rank
