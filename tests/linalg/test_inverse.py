"""Inverses as operators: dense inverses, certificates, and no claim where a system has no solution."""

import math

import pytest
import torch
from linalg_cases import Counted, Failing

from imstep import spectral
from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    IndefinitePreconditionerError,
    KrylovStatus,
    LinearOperator,
    NotSolvedError,
    inverse,
)

F64 = torch.float64


class Wide(LinearOperator):
    """A rectangular matrix that counts its products."""

    def __init__(self, matrix):
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)
        self.matrix, self.products = matrix, 0

    def matvec(self, vector):
        self.products += 1
        return self.matrix @ vector

    def rmatvec(self, vector):
        return self.matrix.T @ vector


def block(n, k, dtype=F64):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(5), dtype=F64).to(dtype)


def solved(matrix, damping, b):
    return torch.linalg.solve(matrix.double() + damping * torch.eye(len(matrix), dtype=F64), b.double())


@pytest.fixture(params=["direct", "iterative"])
def way(request, monkeypatch):
    if request.param == "iterative":
        monkeypatch.setattr(inverse, "_SMALL", 0)
    return request.param


SPECTRA = {
    "definite": torch.logspace(-2, 1, 60),
    "indefinite": torch.cat([torch.linspace(-3, -0.5, 30), torch.linspace(0.4, 2, 30)]),
    "repeated": torch.tensor([1.0] * 30 + [4.0] * 30),
    "negative definite": -torch.linspace(1.0, 3.0, 60),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_products_are_solutions(with_spectrum, way, name, dtype):
    matrix = with_spectrum(SPECTRA[name])[0].to(dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-10
    B = DenseOperator(matrix).inverse(damping=0.05, rtol=tolerance)
    b = block(60, 3, dtype)
    expected = solved(matrix, 0.05, b)
    turned = (b.T @ B).T, (B.T @ b)
    for actual, wanted in ((B @ b, expected), (B @ b[:, 1], expected[:, 1]), *((t, expected) for t in turned)):
        assert (actual.double() - wanted).norm() <= 300 * tolerance * wanted.norm()
        assert actual.dtype is dtype
    assert (B @ b[:, :0]).shape == (60, 0)
    assert (B @ torch.zeros(60, dtype=dtype)).equal(torch.zeros(60, dtype=dtype))


def test_by_default_float32_may_leave_a_thousandth(with_spectrum, way):
    matrix = with_spectrum(torch.cat([torch.zeros(20), torch.logspace(-2, 1, 40)]))[0].float()
    B, b = DenseOperator(matrix).inverse(damping=1e-3), block(60, 3, torch.float32)
    found = B.solve(b)
    assert found.converged.all()
    assert found.residual_norms.max() < 1e-3
    torch.testing.assert_close((B @ b).double(), solved(matrix, 1e-3, b), rtol=0, atol=5.0)
    with pytest.raises(NotSolvedError, match=r"rtol=1e-08.*use float64"):
        DenseOperator(matrix).inverse(damping=1e-3, rtol=1e-8) @ b


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [30, 200])
def test_half_precision_claims_no_more_than_a_tenth(with_spectrum, way, dtype, size):
    matrix, b = with_spectrum(torch.linspace(0.01, 1, size))[0].to(dtype), block(size, 3, dtype)
    found = DenseOperator(matrix).inverse(damping=0.25).solve(b)
    assert bool(found.converged.all())
    assert float((found.solution.double() - solved(matrix, 0.25, b)).norm() / found.solution.double().norm()) < 0.1
    hard = DenseOperator(matrix).inverse().solve(b)
    assert bool((hard.residual_norms[hard.converged] <= 0.1).all())


def test_certificates_are_true_residuals_and_products_are_counted(with_spectrum, way):
    A = Counted(with_spectrum(SPECTRA["definite"])[0])
    B, b = A.inverse(damping=0.1, rtol=1e-8), block(60, 4)
    found = B.solve(b)
    residuals = b - A.matrix @ found.solution - 0.1 * found.solution
    torch.testing.assert_close(found.residual_norms, residuals.norm(dim=0) / b.norm(dim=0), rtol=1e-3, atol=1e-15)
    assert found.converged.all()
    assert set(found.statuses) == {KrylovStatus.CONVERGED}
    assert found.products == A.products
    before = A.products
    B.solve(b)
    assert (A.products - before == 4) == (way == "direct")


def test_a_singular_system_is_solved_where_it_has_a_solution_and_refused_where_not(with_spectrum, way):
    matrix, vectors = with_spectrum([0.0, 0.0, *torch.linspace(1, 2, 58).tolist()])
    B, inside = DenseOperator(matrix).inverse(), vectors[:, 2:] @ torch.ones(58, dtype=F64)
    torch.testing.assert_close(matrix @ (B @ inside), inside, rtol=0, atol=1e-4)
    outside = inside + vectors[:, 0]
    found = B.solve(torch.stack([outside, inside], 1))
    assert found.converged.tolist() == [False, True]
    assert found.residual_norms[0] > 0.1
    assert found.statuses[0] is not KrylovStatus.CONVERGED
    with pytest.raises(NotSolvedError, match=r"1 of 1 systems.*raise damping \(now 0\)"):
        B @ outside


@pytest.mark.parametrize("values", [[0.0] * 60, [1e-12, *[1.0] * 59], [-1e-12, *[1.0] * 59]])
def test_nearly_singular_matrices_make_no_false_claim(with_spectrum, way, values):
    matrix = with_spectrum(values)[0].float()
    b = block(60, 2, torch.float32)
    found = DenseOperator(matrix).inverse().solve(b)
    true = (b.double() - matrix.double() @ found.solution.double()).norm(dim=0) / b.double().norm(dim=0)
    assert ((true <= 2e-5) | ~found.converged).all()


def test_a_damping_that_meets_an_eigenvalue_is_refused(with_spectrum, way):
    matrix = with_spectrum([-1.0, *torch.linspace(1, 2, 59).tolist()])[0]
    with pytest.raises(NotSolvedError):
        DenseOperator(matrix).inverse(damping=1.0, max_iterations=200) @ block(60, 1)


def test_residual_space_where_there_are_fewer_rows(normal, monkeypatch):
    monkeypatch.setattr(inverse, "_SMALL", 16)
    J = Wide(normal(20 * 90).reshape(20, 90))
    b = block(90, 3)
    expected = solved(J.matrix.T @ J.matrix, 1e-3, b)
    B = (J.T @ J).inverse(damping=1e-3, rtol=1e-9)
    torch.testing.assert_close(B @ b, expected, rtol=1e-8, atol=1e-8)
    assert J.products == 20 + 2 * 3  # the Gram matrix; J b and the certificate for each column
    same = ((J.T @ J) @ DenseOperator(torch.eye(90, dtype=F64))).inverse(damping=1e-3, rtol=1e-9)
    torch.testing.assert_close(same @ b, expected, rtol=1e-7, atol=1e-7)
    tall = (Wide(J.matrix.T.contiguous()) @ Wide(J.matrix)).inverse(damping=1e-3, rtol=1e-9)  # not known to be JᵀJ
    torch.testing.assert_close(tall @ b, expected, rtol=1e-7, atol=1e-7)
    turned = J.T
    torch.testing.assert_close((turned @ turned.T).inverse(damping=1e-3, rtol=1e-9) @ b, expected, rtol=1e-8, atol=1e-8)


def test_a_multiple_of_the_jacobian_is_not_taken_for_it(normal, monkeypatch):
    monkeypatch.setattr(inverse, "_SMALL", 4)
    J = Wide(normal(6 * 30).reshape(6, 30))
    twice = (2.0 * J.T) @ J
    expected = solved(2 * J.matrix.T @ J.matrix, 0.1, block(30, 1))
    torch.testing.assert_close(twice.inverse(damping=0.1, rtol=1e-9) @ block(30, 1), expected, rtol=1e-7, atol=1e-7)


def test_preconditioning_saves_products(with_spectrum, normal, monkeypatch):
    monkeypatch.setattr(inverse, "_SMALL", 0)
    sizes = torch.logspace(-2, 2, 80, dtype=F64)
    matrix = sizes[:, None] * with_spectrum(torch.linspace(1.0, 4.0, 80))[0] * sizes
    plain, faster = (
        DenseOperator(matrix).inverse(preconditioner=P, rtol=1e-6).solve(block(80, 2))
        for P in (None, DiagonalOperator(1 / matrix.diag()))
    )
    assert faster.converged.all()
    assert faster.products < plain.products / 3
    with pytest.raises(IndefinitePreconditionerError):
        DenseOperator(matrix).inverse(preconditioner=DiagonalOperator(-sizes)) @ normal(80)


def test_inverses_compose(with_spectrum, way):
    matrix = with_spectrum(torch.linspace(1.0, 3.0, 12))[0]
    A = DenseOperator(matrix)
    torch.testing.assert_close((A @ A.inverse(rtol=1e-9)).to_dense(), torch.eye(12, dtype=F64), rtol=0, atol=1e-7)
    torch.testing.assert_close(A.inverse(rtol=1e-9).inverse(rtol=1e-7).to_dense(), matrix, rtol=0, atol=1e-5)


def test_eigenvalues_next_to_zero_are_those_of_the_inverse(with_spectrum, way):
    values = torch.cat([torch.tensor([0.01, -0.02, 0.05]), torch.linspace(1, 3, 297)])
    inverse_of = DenseOperator(with_spectrum(values)[0]).inverse(rtol=1e-7)
    found = spectral.eigenpairs(inverse_of, 3, tol=1e-4)
    torch.testing.assert_close(1 / found.values, values[:3].double(), rtol=1e-4, atol=0)


def test_products_that_are_not_finite_are_a_status(monkeypatch):
    found = DiagonalOperator(torch.tensor([1.0, math.nan])).inverse().solve(torch.ones(2))
    assert (found.converged.tolist(), found.statuses) == ([False], (KrylovStatus.NON_FINITE,))
    monkeypatch.setattr(inverse, "_SMALL", 0)
    found = Failing(torch.linspace(1, 9, 30), fails_at=3).inverse().solve(torch.ones(30))
    assert found.statuses == (KrylovStatus.NON_FINITE,)
    assert found.solution.isfinite().all()
    assert found.residual_norms[0] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "not negative"),
        ({"rtol": 0.0}, "rtol"),
        ({"rtol": 1.0}, "rtol"),
        ({"max_iterations": -1}, "at least 0"),
        ({"preconditioner": DiagonalOperator(torch.ones(3))}, "agree in size"),
    ],
)
def test_misuse_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        DiagonalOperator(torch.ones(2)).inverse(**options)


def test_matrices_that_are_not_square_or_not_symmetric_are_refused(normal):
    with pytest.raises(ValueError, match="square operator"):
        Wide(normal(6).reshape(2, 3)).inverse()
    with pytest.raises(ValueError, match="not symmetric"):
        DenseOperator(normal(9).reshape(3, 3)).inverse() @ normal(3)
    with pytest.raises(TypeError, match="float64"):
        DiagonalOperator(torch.ones(2)).inverse() @ torch.ones(2, dtype=F64)


def test_a_diagonal_is_inverted_entry_by_entry():
    d = torch.logspace(-8, 8, 2000, dtype=torch.float64)
    found = DiagonalOperator(d).inverse(damping=1e-3).solve(torch.ones(2000, 2).double())
    assert bool(found.converged.all())
    assert found.products == 2
    torch.testing.assert_close(found.solution[:, 1], 1 / (d + 1e-3))
    assert not bool(DiagonalOperator(d - d[0]).inverse().solve(torch.ones(2000).double()).converged.any())
