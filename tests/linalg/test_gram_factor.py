"""Low-rank factors of Gram matrices, and damped least squares by them or by all of K, against dense algebra."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imstep.linalg import (
    DampedLeastSquares,
    DenseFactorisation,
    DenseGram,
    GramFactor,
    GramFactorisation,
    PivotedCholesky,
    RandomizedNystrom,
    gram_nystrom,
    partial_cholesky,
)

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_columns(matrix: DenseGram, tolerance: float) -> GramFactor:
    return gram_nystrom(matrix, tolerance, generator=seeded())


Factorise = Callable[[DenseGram, float], GramFactor]
both = pytest.mark.parametrize("factorise", [partial_cholesky, random_columns])


def rows_with(singular_values: Tensor, count: int, size: int, seed: int = 0) -> Tensor:
    """(count, size) with given singular values, as many as there are."""
    generator = seeded(seed)
    k = len(singular_values)
    left, _ = torch.linalg.qr(torch.randn(count, k, generator=generator, dtype=F64))
    right, _ = torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=F64))
    return left * singular_values @ right.T


def decaying(count: int = 150, size: int = 300) -> Tensor:
    return rows_with(torch.logspace(2, -8, 100, dtype=F64), count, size)


def basis_of(rows: Tensor, found: GramFactor) -> Tensor:
    """The orthonormal basis in which F is J."""
    return (rows if found.pivots is None else rows[found.pivots]).T @ found.combination


def missing(rows: Tensor, found: GramFactor) -> Tensor:
    return rows @ rows.T - found.factor @ found.factor.T


@both
@pytest.mark.parametrize("tolerance", [1e2, 1.0, 1e-3, 1e-8])
def test_leaves_less_than_the_tolerance(factorise: Factorise, tolerance: float) -> None:
    rows = decaying()
    found = factorise(DenseGram(rows @ rows.T), tolerance)
    left = missing(rows, found)
    assert found.remainder <= tolerance
    assert left.trace() <= tolerance + 1e-10
    assert torch.linalg.eigvalsh(left).min() >= -1e-10
    assert found.remainder == pytest.approx(float(left.trace()), abs=1e-10)
    assert found.rank < 100


@both
def test_rank_follows_the_spectrum(factorise: Factorise) -> None:
    """The best rank for a remainder of t is the number of eigenvalues down to where the rest adds up to t."""
    rows = decaying()
    values = torch.linalg.eigvalsh(rows @ rows.T).flip(0)
    rest = values.sum() - values.cumsum(0)
    for tolerance in (1.0, 1e-3):
        best = int((rest > tolerance).sum()) + 1
        found = factorise(DenseGram(rows @ rows.T), tolerance)
        assert best <= found.rank <= 1.5 * best + 48


@both
def test_is_the_jacobian_in_an_orthonormal_basis(factorise: Factorise) -> None:
    rows = decaying()
    found = factorise(DenseGram(rows @ rows.T), 1e-2)
    basis = basis_of(rows, found)
    torch.testing.assert_close(basis.T @ basis, torch.eye(found.rank, dtype=F64), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.factor, rows @ basis)


@both
def test_goes_on_to_the_rank_that_rounding_allows(factorise: Factorise) -> None:
    rows = rows_with(torch.ones(7, dtype=F64), 40, 60)
    found = factorise(DenseGram(rows @ rows.T), 0.0)
    assert found.rank == 7
    assert missing(rows, found).abs().max() < 1e-12


@both
def test_full_rank(factorise: Factorise) -> None:
    rows = rows_with(torch.linspace(1, 2, 60, dtype=F64), 60, 80)
    found = factorise(DenseGram(rows @ rows.T), 0.0)
    assert found.rank == 60
    assert missing(rows, found).abs().max() < 1e-12


@both
def test_repeated_rows_and_zeros(factorise: Factorise) -> None:
    rows = torch.cat([decaying()[:20]] * 3)
    rows[5] = 0
    found = factorise(DenseGram(rows @ rows.T), 1e-6)
    assert found.rank == 20
    assert missing(rows, found).trace() <= 1e-6 + 1e-10


@both
def test_nothing_to_take(factorise: Factorise) -> None:
    for tolerance in (0.0, 1.0):
        found = factorise(DenseGram(torch.zeros(5, 5)), tolerance)
        assert (found.rank, found.remainder, found.factor.shape) == (0, 0.0, (5, 0))


@both
def test_refuses_a_negative_tolerance(factorise: Factorise) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        factorise(DenseGram(torch.eye(2)), -1.0)


@given(
    st.integers(1, 70),
    st.integers(1, 90),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-8, 1e-2]),
    st.sampled_from([partial_cholesky, random_columns]),
)
@settings(max_examples=30, deadline=None)
def test_any_shape(count: int, size: int, seed: int, tolerance: float, factorise: Factorise) -> None:
    rows = torch.randn(count, size, generator=seeded(seed), dtype=F64)
    found = factorise(DenseGram(rows @ rows.T), tolerance)
    assert missing(rows, found).abs().max() <= max(tolerance, 1e-9)


@pytest.mark.parametrize("most", [0, 47, 48, 60, 150])
def test_takes_no_more_columns_than_allowed(most: int) -> None:
    rows = decaying()
    found = partial_cholesky(DenseGram(rows @ rows.T), 1e-8, most=most)
    assert found.pivots is not None
    assert len(found.pivots) <= most
    assert (found.rank > 0) is (most >= 48)  # the first block
    assert (found.remainder <= 1e-8) is (most == 150)
    assert found.remainder == pytest.approx(float(missing(rows, found).trace()), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("tolerance", [10.0, 1e-2])
def test_random_columns_are_the_definition(tolerance: float) -> None:
    """K Ω (Ωᵀ K Ω)⁻¹ Ωᵀ K with the same Ω in one piece; the orthonormal basis spans Jᵀ Ω."""
    blocks: list[Tensor] = []

    class Watched(DenseGram):
        def matmat(self, block: Tensor) -> Tensor:
            blocks.append(block)
            return super().matmat(block)

    rows = decaying()
    K = rows @ rows.T
    found = random_columns(Watched(K), tolerance)
    test = torch.cat(blocks, 1)
    assert test.shape[1] == found.rank
    images = K @ test
    expected = images @ torch.linalg.lstsq(test.T @ images, images.T, driver="gelsd").solution
    torch.testing.assert_close(found.factor @ found.factor.T, expected, rtol=0, atol=1e-6)


def test_random_columns_come_from_their_generator_only() -> None:
    K, state = DenseGram(decaying() @ decaying().T), torch.get_rng_state()
    first, same, other = (gram_nystrom(K, 1.0, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.factor, same.factor)
    assert not torch.equal(first.factor, other.factor)


# --- damped least squares ---------------------------------------------------------------------------------------------


def dense_step(rows: Tensor, residuals: Tensor, damping: float) -> Tensor:
    normal = rows.T @ rows + damping * torch.eye(rows.shape[1], dtype=F64)
    return -torch.linalg.solve(normal, rows.T @ residuals)


def step_of(rows: Tensor, reduced: DampedLeastSquares, coordinates: Tensor) -> Tensor:
    return (rows if reduced.pivots is None else rows[reduced.pivots]).T @ reduced.weights(coordinates)


STRATEGIES = [PivotedCholesky(most=1), RandomizedNystrom(), PivotedCholesky(), DenseFactorisation()]
all_of_them = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)


@all_of_them
@pytest.mark.parametrize("damping", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("share", [1e-6, 1e-2, 1.0])
def test_step_is_that_of_levenberg_and_marquardt(strategy: GramFactorisation, damping: float, share: float) -> None:
    """What a remainder of share · λ leaves out of the step is of the order of the share's square root."""
    rows, residuals = decaying(), torch.randn(150, generator=seeded(1), dtype=F64)
    reduced = strategy.factorise(DenseGram(rows @ rows.T), share * damping, draw=0)
    u = reduced.solve(residuals, torch.zeros(reduced.rank, dtype=F64), damping)
    step, exact = step_of(rows, reduced, u), dense_step(rows, residuals, damping)
    assert (step - exact).norm() <= max(share**0.5, 5e-3) * exact.norm()
    assert reduced.norm(u) == pytest.approx(float(step.norm()), rel=1e-5)
    torch.testing.assert_close(reduced.image(u), rows @ step, rtol=1e-5, atol=1e-6)


@all_of_them
def test_is_exact_without_a_tolerance(strategy: GramFactorisation) -> None:
    rows, residuals = rows_with(torch.logspace(1, -2, 100, dtype=F64), 150, 300), torch.ones(150, dtype=F64)
    reduced = strategy.factorise(DenseGram(rows @ rows.T), 0.0, draw=0)
    for damping in (1.0, 1e-3):
        u = reduced.solve(residuals, torch.zeros(reduced.rank, dtype=F64), damping)
        expected = dense_step(rows, residuals, damping)
        torch.testing.assert_close(step_of(rows, reduced, u), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=str)
def test_is_optimal_within_its_span_however_large_the_tolerance(strategy: GramFactorisation) -> None:
    rows, residuals = decaying(), torch.randn(150, generator=seeded(1), dtype=F64)
    reduced, damping = strategy.factorise(DenseGram(rows @ rows.T), 1e3, draw=0), 0.1
    step = step_of(rows, reduced, reduced.solve(residuals, torch.zeros(reduced.rank, dtype=F64), damping))
    basis = torch.stack([step_of(rows, reduced, unit) for unit in torch.eye(reduced.rank, dtype=F64)], 1)
    gradient = rows.T @ (residuals + rows @ step) + damping * step
    assert (basis.T @ gradient).norm() < 1e-8 * (rows.T @ residuals).norm()


@all_of_them
def test_goes_on_from_coordinates(strategy: GramFactorisation) -> None:
    """One correction leads from any start to the minimiser, since the problem is quadratic."""
    rows, residuals = decaying(), torch.randn(150, generator=seeded(1), dtype=F64)
    reduced = strategy.factorise(DenseGram(rows @ rows.T), 1e-6, draw=0)
    best = reduced.solve(residuals, torch.zeros(reduced.rank, dtype=F64), 0.1)
    start = torch.randn(reduced.rank, generator=seeded(2), dtype=F64)
    after = start + reduced.solve(residuals + reduced.image(start), start, 0.1)
    torch.testing.assert_close(step_of(rows, reduced, after), step_of(rows, reduced, best))


@all_of_them
def test_no_damping_of_a_singular_system(strategy: GramFactorisation) -> None:
    rows = rows_with(torch.tensor([1.0, 1e-7], dtype=F64), 10, 20)
    reduced = strategy.factorise(DenseGram(rows @ rows.T), 0.0, draw=0)
    u = reduced.solve(torch.ones(10, dtype=F64), torch.zeros(reduced.rank, dtype=F64), 0.0)
    assert bool(u.isfinite().all())


def test_draws_differ_and_repeat() -> None:
    K = DenseGram(decaying() @ decaying().T)
    draw = lambda seed, draw: RandomizedNystrom(seed).factorise(K, 1e3, draw).weights(torch.ones(48, dtype=F64))
    assert torch.equal(draw(0, 1), draw(0, 1))
    for other in ((0, 2), (1, 1), (1, 0)):
        assert not torch.equal(draw(0, 1), draw(*other))


@pytest.mark.parametrize(
    ("rows", "tolerance", "few"),
    [
        (decaying(), 1e-2, True),
        (rows_with(torch.ones(150, dtype=F64), 150, 300), 1e-2, False),  # eigenvalues do not fall
        (decaying(), 1e-12, False),  # rounding hides what is left
        (torch.zeros(150, 1, dtype=F64), 0.0, True),
    ],
)
def test_takes_few_columns_or_all(rows: Tensor, tolerance: float, few: bool) -> None:
    reduced = PivotedCholesky().factorise(DenseGram(rows @ rows.T), tolerance, draw=0)
    assert (reduced.pivots is not None) is few
    assert reduced.rank <= 50 if few else reduced.rank == 150


class CountedGram(DenseGram):
    """Counts the entries that it is asked for."""

    asked = 0

    def entries(self, rows: slice | Tensor, columns: Tensor) -> Tensor:
        found = super().entries(rows, columns)
        self.asked += found.numel()
        return found

    def dense(self) -> Tensor:
        return self.entries(slice(None), torch.arange(self.size))


def test_columns_that_did_not_do_are_not_computed_again() -> None:
    """Where few columns were tried in vain, all of K takes the entries outside them and no more."""
    rows = rows_with(torch.logspace(0, -1, 200, dtype=F64), 200, 300)
    K = CountedGram(rows @ rows.T)
    tried = partial_cholesky(K, 1e-3, most=100).pivots
    assert tried is not None
    assert len(tried) > 40
    of_columns, K.asked = K.asked, 0
    reduced = PivotedCholesky(most=0.5).factorise(K, 1e-3, draw=0)
    assert K.asked == of_columns + (200 - len(tried)) ** 2
    torch.testing.assert_close(reduced.inner(torch.eye(200, dtype=F64), torch.eye(200, dtype=F64)), rows @ rows.T)


@pytest.mark.parametrize("most", [-0.1, 1.5, float("nan")])
def test_refuses_a_fraction_out_of_range(most: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        PivotedCholesky(most=most)
