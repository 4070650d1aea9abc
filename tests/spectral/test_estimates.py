"""Trace and diagonal: exact where they can be, and errors that cover the truth as often as they say."""

import math

import pytest
import torch
from spectral_cases import F64, SPECTRA, Counted, planted, seeded

import imstep
from imstep import spectral
from imstep.linalg import DenseOperator, DiagonalOperator, LinearOperator

DTYPES = [torch.float32, F64]


@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_covers_the_trace_in_nineteen_of_twenty_cases(name):
    A = DenseOperator(planted(SPECTRA[name]))
    true = float(SPECTRA[name].sum())
    found = [spectral.trace(A, rtol=0.02, seed=seed) for seed in range(100)]
    assert all(one.converged for one in found)
    assert sum(abs(one.value - true) <= one.error for one in found) >= 88
    assert max(abs(one.value - true) for one in found) < 0.08 * true


@pytest.mark.parametrize("name", SPECTRA)
def test_the_errors_cover_the_diagonal_in_nineteen_of_twenty_cases(name):
    matrix = planted(SPECTRA[name])
    found = [spectral.diagonal(DenseOperator(matrix), rtol=0.1, seed=seed) for seed in range(20)]
    covered = torch.stack([(one.value - matrix.diag()).abs() <= one.error for one in found])
    assert 0.9 <= covered.double().mean() <= 1
    for one in found:
        assert one.converged
        assert (one.value - matrix.diag()).norm() < 0.2 * matrix.diag().norm()
        assert one.error.norm() <= 0.1 * one.value.norm() * 1.001


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("name", SPECTRA)
def test_units_whose_squares_leave_the_range_of_the_dtype_change_nothing(name, unit):
    matrix = planted(SPECTRA[name]).float()
    one, other = (spectral.diagonal(DenseOperator(u * matrix), rtol=0.1) for u in (1, unit))
    assert other.converged
    assert other.products == one.products
    assert torch.allclose(other.value / unit, one.value, rtol=1e-4)
    assert torch.allclose(other.error / unit, one.error, rtol=1e-2)
    for shape in ((len(matrix), len(matrix)), (len(matrix), 30), (30, len(matrix))):
        part = matrix[: shape[0], : shape[1]]
        norm = spectral.frobenius_norm(DenseOperator(unit * part), rtol=0.02)
        assert norm.converged
        assert abs(norm.value / unit - float(part.norm())) < 0.06 * float(part.norm())
        assert 0 < norm.error / unit < 0.021 * float(part.norm())


@pytest.mark.parametrize("unit", [2.0**-1000, 2.0**1000])
def test_units_whose_squares_leave_the_range_of_float64_change_nothing(unit):
    """Powers of two: digit by digit."""
    for size in (10, 200):
        matrix = planted(torch.linspace(0.1, 1, size, dtype=F64) ** 2)
        near, far = DenseOperator(matrix), DenseOperator(unit * matrix)
        for estimate in (spectral.trace, spectral.diagonal):
            one, other = estimate(near, 0.01), estimate(far, 0.01)
            assert other.converged
            assert other.products == one.products
            for name in ("value", "error"):
                expected = torch.as_tensor(getattr(one, name), dtype=F64)
                torch.testing.assert_close(torch.as_tensor(getattr(other, name), dtype=F64) / unit, expected)
        loose = spectral.trace(far, 0.0, atol=0.2 * unit)
        assert abs(loose.value / unit - float(matrix.trace())) < 0.4
        one, other = spectral.condition_number(near), spectral.condition_number(far)
        assert other.converged
        assert abs(other.value - one.value) <= one.error + other.error


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_of_low_rank_is_done_with_few_products(dtype):
    matrix = planted(SPECTRA["few"]).to(dtype)
    for estimate, true in ((spectral.trace, matrix.trace()), (spectral.diagonal, matrix.diag())):
        A = Counted(matrix)
        found = estimate(A, rtol=1e-4)
        assert found.products == A.products < 70
        error = torch.as_tensor(found.value - true).abs().max()
        assert float(error) < (1e-12 if dtype is F64 else 1e-5 * float(matrix.trace()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_diagonal_matrix_takes_one_block_of_probes(dtype):
    values = torch.linspace(-1, 3, 500, dtype=dtype)
    trace, diagonal = spectral.trace(DiagonalOperator(values)), spectral.diagonal(DiagonalOperator(values))
    assert trace.value == pytest.approx(float(values.double().sum()), rel=1e-5)
    assert trace.converged
    assert trace.products == diagonal.products == 8
    torch.testing.assert_close(diagonal.value, values)


def test_small_matrices_are_exact():
    for n in (1, 2, 16):
        matrix = planted(torch.linspace(-1, 5, n, dtype=F64))
        trace, diagonal = spectral.trace(Counted(matrix), rtol=0.0), spectral.diagonal(Counted(matrix))
        assert trace.value == pytest.approx(float(matrix.trace()), rel=1e-14)
        assert trace.error < 1e-12
        assert trace.products == n
        torch.testing.assert_close(diagonal.value, matrix.diag())
    assert spectral.trace(DenseOperator(torch.zeros(0, 0))).value == 0


@pytest.mark.parametrize("estimate", [spectral.trace, spectral.diagonal])
def test_zero_is_zero(estimate):
    found = estimate(DenseOperator(torch.zeros(300, 300)))
    assert found.converged
    assert float(torch.as_tensor(found.value).abs().sum()) == float(torch.as_tensor(found.error).abs().sum()) == 0


@pytest.mark.parametrize("estimate", [spectral.trace, spectral.diagonal])
def test_never_many_more_products_than_rows(estimate):
    A = Counted(planted(torch.linspace(-1, 1.001, 300, dtype=F64)))  # a trace near zero
    found = estimate(A, rtol=1e-3)
    assert A.products <= 1.6 * 300
    torch.testing.assert_close(
        torch.as_tensor(found.value, dtype=F64), A.matrix.trace() if estimate is spectral.trace else A.matrix.diag()
    )


def test_what_does_not_converge_says_so():
    A = Counted(planted(torch.linspace(-1, 1.2, 400, dtype=F64)))
    found = spectral.trace(A, rtol=1e-4, max_products=50)
    assert not found.converged
    assert found.products == A.products <= 60
    assert abs(found.value - float(A.matrix.trace())) < 2 * found.error
    assert spectral.trace(A, rtol=0.0, atol=30.0).converged
    one = spectral.trace(A, max_products=1)
    assert (one.converged, one.error, one.products) == (False, math.inf, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_that_are_not_symmetric_have_traces_and_diagonals(dtype):
    left, right = (torch.randn(150, 12, generator=seeded(s), dtype=F64) for s in (1, 2))
    matrix = (left @ right.T + 0.1 * torch.randn(150, 150, generator=seeded(3), dtype=F64)).to(dtype)
    found = [spectral.trace(DenseOperator(matrix), rtol=0.05, seed=seed) for seed in range(30)]
    assert sum(abs(one.value - float(matrix.trace())) <= one.error for one in found) >= 24
    diagonal = spectral.diagonal(DenseOperator(matrix), rtol=0.05)
    assert (diagonal.value - matrix.diag()).norm() < 0.1 * matrix.diag().norm()
    product = DenseOperator(matrix) @ DenseOperator(matrix.T)
    assert spectral.trace(product, rtol=0.01).value == pytest.approx(float(matrix.double().square().sum()), rel=0.03)


@pytest.mark.parametrize("estimate", [spectral.trace, spectral.diagonal])
def test_the_same_seed_or_generator_gives_the_same_numbers(estimate):
    A = DenseOperator(planted(SPECTRA["falling slowly"]))
    value = lambda **options: torch.as_tensor(estimate(A, rtol=0.1, **options).value)
    assert value(seed=3).equal(value(seed=3))
    assert value(seed=3).equal(value(generator=seeded(3)))
    assert not value(seed=3).equal(value(seed=4))
    state = torch.get_rng_state()
    value()
    assert torch.get_rng_state().equal(state)


class Explosive(LinearOperator):
    """Products are not finite from the second block on."""

    def __init__(self):
        super().__init__(300, torch.float32, "cpu")
        self.blocks = 0

    def matvec(self, vector):
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, block):
        self.blocks += 1
        return block.flip(0) * (1 if self.blocks < 2 else math.inf)


@pytest.mark.parametrize("estimate", [spectral.trace, spectral.diagonal])
def test_products_that_are_not_finite_are_a_value(estimate):
    found = estimate(Explosive(), rtol=1e-3)
    assert not found.converged
    assert not torch.as_tensor(found.value).isfinite().all()
    assert found.products < 100


def test_a_sum_beyond_the_range_of_the_dtype_has_not_converged():
    estimate = spectral.diagonal(DenseOperator(1e36 * planted(torch.linspace(1.0, 120.0, 120, dtype=F64)).float()))
    assert estimate.value.isfinite().all() or not estimate.converged


def test_by_layer_and_parameter_of_every_matrix():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(2, (20,))
    loss = torch.nn.functional.cross_entropy
    data = [(x[:12], y[:12]), (x[12:], y[12:])]
    for operator in (
        imstep.Hessian(lambda: loss(model(x), y), model),
        imstep.GaussNewton(lambda: (model(x), y), model, loss),
        imstep.Fisher(lambda: (model(x), y), model, imstep.curvature.Categorical()),
        imstep.Hessian.over(data, lambda batch: loss(model(batch[0]), batch[1]), model),
    ):
        diagonal = operator.to_dense().diag()
        layers = spectral.trace(operator, by="layer", rtol=1e-3)
        assert list(layers) == ["0", "2"]
        assert layers["0"].value == pytest.approx(float(diagonal[:30].sum()), rel=3e-3)
        assert layers["2"].value == pytest.approx(float(diagonal[30:].sum()), rel=3e-3)
        parameters = spectral.diagonal(operator, by="parameter", rtol=1e-3)
        assert list(parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        torch.testing.assert_close(parameters["2.bias"].value, diagonal[-2:])
    with pytest.raises(ValueError, match="belongs to a model"):
        spectral.trace(DiagonalOperator(x[0]), by="layer")


@pytest.mark.parametrize("options", [{"rtol": -1.0}, {"atol": -1.0}, {"max_products": 0}, {"rtol": math.nan}])
def test_misuse_is_explained(options):
    with pytest.raises(ValueError, match="at least"):
        spectral.trace(DiagonalOperator(torch.ones(99)), **options)
    with pytest.raises(ValueError, match="square"):
        spectral.diagonal(DenseOperator(torch.ones(3, 3)).submatrix([0], [0, 1]))
