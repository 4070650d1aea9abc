import math

import pytest
import scipy.sparse.linalg
import torch

from imstep.linalg import DenseOperator, DiagonalOperator, lanczos, largest_eigenpair, smallest_eigenpair

F64 = torch.float64


def tridiagonal(result):
    off = result.betas[:-1]
    return torch.diag(result.alphas) + torch.diag(off, 1) + torch.diag(off, -1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_lanczos_relation(with_spectrum, normal, dtype):
    matrix, _ = with_spectrum(
        torch.logspace(-6, 3, 80)
    )  # the fast end loses orthogonality at once without care
    result = lanczos(DenseOperator(matrix.to(dtype)), normal(80).to(dtype), 40)
    Q, eps = result.basis.double(), torch.finfo(dtype).eps
    assert (Q.T @ Q - torch.eye(40, dtype=F64)).abs().max() < 20 * eps
    left_out = matrix @ Q - Q @ tridiagonal(result)
    assert left_out[:, :-1].norm() < 100 * eps * 1e3
    assert left_out[:, -1].norm().item() == pytest.approx(
        result.betas[-1].item(), rel=1e-2, abs=100 * eps * 1e3
    )
    assert result.steps == 40


def test_all_steps_give_all_eigenvalues(with_spectrum, normal):
    values = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0], dtype=F64)
    matrix, _ = with_spectrum(values)
    result = lanczos(DenseOperator(matrix), normal(6), steps=100)
    assert result.steps == 6
    torch.testing.assert_close(result.ritz()[0], values, atol=1e-12, rtol=1e-12)


def test_an_invariant_space_ends_it_early(with_spectrum, normal):
    matrix, vectors = with_spectrum([1.0, 2.0, 3.0, 4.0, 5.0])
    result = lanczos(DenseOperator(matrix), vectors[:, 1] + vectors[:, 3], steps=5)
    assert result.steps == 2
    torch.testing.assert_close(result.ritz()[0], torch.tensor([2.0, 4.0], dtype=F64))
    assert result.betas[-1] < 1e-13
    assert lanczos(DenseOperator(torch.zeros(3, 3)), torch.ones(3), steps=3).steps == 1


def test_extreme_eigenpairs_agree_with_scipy(with_spectrum):
    matrix, _ = with_spectrum([-0.5, *torch.logspace(-3, 1, 199).tolist()])
    operator = DenseOperator(matrix)
    for solve, which in ((smallest_eigenpair, "SA"), (largest_eigenpair, "LA")):
        pair = solve(operator, generator=torch.Generator().manual_seed(3), steps=60)
        value, vector = scipy.sparse.linalg.eigsh(matrix.numpy(), k=1, which=which)
        assert pair.value == pytest.approx(value[0], rel=1e-8)
        assert abs(pair.vector @ torch.as_tensor(vector[:, 0])) > 1 - 1e-6
        assert pair.products == 60


@pytest.mark.parametrize("steps", [1, 3, 10, 25])
def test_the_residual_is_a_certificate(with_spectrum, steps):
    matrix, _ = with_spectrum(torch.linspace(-1.0, 4.0, 100))
    pair = smallest_eigenpair(DenseOperator(matrix), generator=torch.Generator().manual_seed(0), steps=steps)
    true = (matrix @ pair.vector - pair.value * pair.vector).norm().item()
    assert pair.residual_norm == pytest.approx(true, rel=1e-6, abs=1e-12)
    assert pair.value >= -1.0 - 1e-12
    assert (torch.linalg.eigvalsh(matrix) - pair.value).abs().min() <= true + 1e-12
    assert pair.vector.norm().item() == pytest.approx(1.0)


def test_the_same_generator_gives_the_same_pair(with_spectrum):
    matrix, _ = with_spectrum(torch.linspace(-1.0, 4.0, 30))
    first, second = (
        smallest_eigenpair(DenseOperator(matrix.float()), generator=torch.Generator().manual_seed(7), steps=5)
        for _ in range(2)
    )
    assert first.value == second.value
    assert first.vector.equal(second.vector)
    assert first.vector.dtype == torch.float32


def test_a_product_that_is_not_finite_is_a_value():
    pair = smallest_eigenpair(DiagonalOperator(torch.tensor([1.0, math.nan])), generator=torch.Generator())
    assert math.isnan(pair.value)
    assert pair.residual_norm == math.inf
    assert pair.vector.isfinite().all()


@pytest.mark.parametrize(
    ("start", "steps", "message"),
    [
        (torch.zeros(2), 1, "not zero"),
        (torch.tensor([1.0, math.inf]), 1, "finite"),
        (torch.ones(2, 1), 1, "one finite start vector"),
        (torch.ones(3), 1, "shape"),
        (torch.ones(2), 0, "at least one step"),
    ],
)
def test_misuse_is_explained(start, steps, message):
    with pytest.raises(ValueError, match=message):
        lanczos(DenseOperator(torch.eye(2)), start, steps)


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**100])
def test_units_whose_squares_leave_the_range_of_single_precision_change_nothing(with_spectrum, normal, unit):
    matrix, _ = with_spectrum(torch.linspace(-3.0, 4.0, 30))
    one, other = (lanczos(DenseOperator(u * matrix.float()), normal(30).float() / u, 12) for u in (1.0, unit))
    assert other.steps == 12
    torch.testing.assert_close(other.alphas / unit, one.alphas)
    torch.testing.assert_close(other.betas / unit, one.betas)
    pair = largest_eigenpair(DenseOperator(unit * matrix.float()))
    assert pair.value / unit == pytest.approx(4.0, rel=1e-5)
