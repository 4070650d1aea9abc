import sys

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    IdentityOperator,
    LinearOperator,
    SplitOperator,
    conjugate_gradient,
)


class ByVectors(LinearOperator):
    """A matrix behind `matvec` only, so that the default `matmat` is tested."""

    def __init__(self, matrix):
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix
        self.products = 0

    def matvec(self, vector):
        self.products += 1
        return self.matrix @ vector


class Rectangular(ByVectors):
    """A matrix of any shape behind products with single vectors."""

    def __init__(self, matrix):
        LinearOperator.__init__(self, tuple(matrix.shape), matrix.dtype, matrix.device)
        self.matrix, self.products = matrix, 0

    def rmatvec(self, vector):
        self.products += 1
        return self.matrix.T @ vector


@pytest.fixture
def matrix(with_spectrum):
    return with_spectrum([3.0, 1.0, -2.0, 0.5])[0]


OPERATORS = {
    "dense": lambda A: (DenseOperator(A), A),
    "by vectors": lambda A: (ByVectors(A), A),
    "diagonal": lambda A: (DiagonalOperator(A.diag()), torch.diag(A.diag())),
    "identity": lambda A: (IdentityOperator.like(DenseOperator(A)), torch.eye(len(A), dtype=A.dtype)),
    "sum": lambda A: (DenseOperator(A) + DiagonalOperator(A[0]), A + torch.diag(A[0])),
    "difference": lambda A: (DenseOperator(A) - ByVectors(2 * A), -A),
    "multiple": lambda A: (-3 * DenseOperator(A) * 2, -6 * A),
    "numbers of other kinds": lambda A: (np.float32(3) * DenseOperator(A) * torch.tensor(2) / np.int64(3), 2 * A),
    "negative": lambda A: (-DenseOperator(A), -A),
    "shift": lambda A: (
        DenseOperator(A) + 0.1 * IdentityOperator.like(DenseOperator(A)),
        A + 0.1 * torch.eye(len(A), dtype=A.dtype),
    ),
    "split": lambda A: (SplitOperator(DenseOperator(A), DenseOperator(3 * A)), 2 * A),
}


@pytest.mark.parametrize("build", OPERATORS.values(), ids=OPERATORS.keys())
def test_products_agree_with_the_dense_matrix(build, matrix, normal):
    operator, dense = build(matrix)
    vector, block = normal(4), normal(12).reshape(4, 3)
    torch.testing.assert_close(operator @ vector, dense @ vector)
    torch.testing.assert_close(operator @ block, dense @ block)
    torch.testing.assert_close(operator @ block[:, :0], dense @ block[:, :0])
    torch.testing.assert_close(operator.rmatvec(vector), dense.T @ vector)
    torch.testing.assert_close(operator.to_dense(), dense)
    assert operator.shape == (4, 4)


@pytest.mark.parametrize("build", OPERATORS.values(), ids=OPERATORS.keys())
def test_scipy_sees_the_same_operator(build, matrix, normal):
    operator, dense = build(matrix)
    foreign = operator.to_scipy()
    vector = normal(4).numpy()
    np.testing.assert_allclose(foreign @ vector, dense.numpy() @ vector, atol=1e-13)
    np.testing.assert_allclose(foreign.rmatvec(vector), dense.numpy().T @ vector, atol=1e-13)
    np.testing.assert_allclose(foreign @ np.eye(4), dense.numpy(), atol=1e-13)
    assert foreign.dtype == np.float64


def test_a_matrix_that_is_not_symmetric_keeps_its_transpose(normal):
    matrix = normal(9).reshape(3, 3)
    operator = 2 * DenseOperator(matrix) + DenseOperator(matrix)
    torch.testing.assert_close(operator.rmatvec(normal(3)), 3 * matrix.T @ normal(3))


RECTANGULAR = {
    "itself": lambda A: (Rectangular(A), A),
    "transpose": lambda A: (Rectangular(A.T).T, A),
    "twice transposed": lambda A: (Rectangular(A).T.T, A),
    "sum": lambda A: (Rectangular(A) + Rectangular(A.flip(0)), A + A.flip(0)),
    "multiple of a transpose": lambda A: (-2 * Rectangular(A.T).T, -2 * A),
    "transpose of a sum": lambda A: ((Rectangular(A.T) - 3 * Rectangular(A.T)).T, -2 * A),
}


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (3, 0)])
@pytest.mark.parametrize("build", RECTANGULAR.values(), ids=RECTANGULAR.keys())
def test_rectangular_operators(build, shape, normal):
    m, n = shape
    operator, dense = build(normal(m * n).reshape(m, n))
    assert (operator.shape, operator.T.shape) == ((m, n), (n, m))
    u, v = normal(3 * m).reshape(m, 3), normal(3 * n).reshape(n, 3)
    torch.testing.assert_close(operator @ v, dense @ v)
    torch.testing.assert_close(operator @ v[:, 0], dense @ v[:, 0])
    torch.testing.assert_close(operator @ v[:, :0], dense @ v[:, :0])
    torch.testing.assert_close(operator.T @ u, dense.T @ u)
    torch.testing.assert_close(operator.T @ u[:, 0], dense.T @ u[:, 0])
    torch.testing.assert_close(operator.to_dense(), dense)
    foreign = operator.to_scipy()
    assert foreign.shape == shape
    np.testing.assert_allclose(foreign @ v.numpy(), dense.numpy() @ v.numpy(), atol=1e-13)
    np.testing.assert_allclose(foreign.T @ u.numpy(), dense.numpy().T @ u.numpy(), atol=1e-13)
    np.testing.assert_allclose(foreign.rmatvec(u[:, 0].numpy()), dense.numpy().T @ u[:, 0].numpy(), atol=1e-13)


def test_dense_form_takes_the_shorter_side(normal):
    wide = Rectangular(normal(12).reshape(2, 6))
    wide.to_dense()
    assert wide.products == 2
    with pytest.raises(ValueError, match=r"limit is 3 squared.*limit=4"):
        wide.to_dense(limit=3)
    assert wide.to_dense(limit=4).shape == (2, 6)


def test_solvers_refuse_rectangular_operators(normal):
    wide = Rectangular(normal(12).reshape(2, 6))
    with pytest.raises(ValueError, match=r"square operator.*\(2, 6\)"):
        conjugate_gradient(wide, normal(6))
    with pytest.raises(ValueError, match=r"\(2, 6\) multiplies vectors of shape \(6,\)"):
        wide @ normal(2)
    with pytest.raises(ValueError, match="agree in size"):
        wide + wide.T


def test_scipy_eigenvalues_through_the_bridge(with_spectrum):
    matrix, _ = with_spectrum(torch.linspace(-2.0, 5.0, 40))
    smallest = scipy.sparse.linalg.eigsh(DenseOperator(matrix).to_scipy(), k=1, which="SA")[0]
    assert smallest[0] == pytest.approx(-2.0, abs=1e-9)


def test_to_scipy_without_scipy_says_what_to_install(matrix, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        DenseOperator(matrix).to_scipy()


def test_to_dense_is_guarded():
    with pytest.raises(ValueError, match="limit is 4096"):
        IdentityOperator(5000).to_dense()
    assert IdentityOperator(5).to_dense(limit=5).equal(torch.eye(5))


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (torch.ones(3, dtype=torch.float64), ValueError, r"shape \(4,\)"),
        (torch.ones(2, 4, dtype=torch.float64), ValueError, "Flatten or transpose"),
        (torch.ones(4, 1, 1, dtype=torch.float64), ValueError, r"\(4, 1, 1\)"),
        (torch.ones(4), TypeError, r"v.to\(torch.float64\)"),
        (torch.ones(4, dtype=torch.float64, device="meta"), ValueError, "lives on cpu"),
        (np.ones(4), TypeError, "torch.as_tensor"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(matrix, other, error, message):
    with pytest.raises(error, match=message):
        DenseOperator(matrix) @ other


def test_operators_that_do_not_fit_are_refused(matrix):
    with pytest.raises(ValueError, match="agree in size, dtype and device"):
        DenseOperator(matrix) + IdentityOperator(4)
    with pytest.raises(ValueError, match="agree in size"):
        SplitOperator(IdentityOperator(3), IdentityOperator(4))
    with pytest.raises(ValueError, match="matrix"):
        DenseOperator(matrix[0])
    with pytest.raises(ValueError, match="vector"):
        DiagonalOperator(matrix)
    with pytest.raises(ValueError, match="at least 0"):
        IdentityOperator(-1)
    with pytest.raises(TypeError):
        DenseOperator(matrix) + 1.0
    with pytest.raises(TypeError):
        DenseOperator(matrix) * "2"


@settings(deadline=None, max_examples=30)
@given(
    alpha=st.floats(-10, 10),
    beta=st.floats(-10, 10),
    n=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_products_are_linear_and_symmetric(alpha, beta, n, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix, u, v = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((n, n), (n,), (n,)))
    A = DenseOperator(matrix + matrix.T) + alpha * IdentityOperator(n, dtype=torch.float64)
    torch.testing.assert_close(
        A @ (alpha * u + beta * v), alpha * (A @ u) + beta * (A @ v), atol=1e-9, rtol=1e-9
    )
    torch.testing.assert_close(u @ (A @ v), v @ (A @ u), atol=1e-9, rtol=1e-9)


def test_products_of_operators(normal):
    A, B, v = normal(15).reshape(3, 5), normal(20, seed=2).reshape(5, 4), normal(4)
    product = Rectangular(A) @ Rectangular(B)
    assert product.shape == (3, 4)
    torch.testing.assert_close(product @ v, A @ B @ v)
    torch.testing.assert_close(product.to_dense(), A @ B)
    torch.testing.assert_close(product.T.to_dense(), (A @ B).T)
    torch.testing.assert_close((2 * product @ product.T).to_dense(), 2 * A @ B @ B.T @ A.T)
    with pytest.raises(ValueError, match=r"shape \(3, 5\).*columns of the first must be rows of the second"):
        Rectangular(A) @ Rectangular(B).T
    with pytest.raises(TypeError, match=r"works in torch.float64, the second in torch.float32"):
        Rectangular(A) @ Rectangular(B.float())


def test_vectors_from_the_left(normal):
    A, x, X = normal(15).reshape(3, 5), normal(3), normal(6).reshape(2, 3)
    torch.testing.assert_close(x @ Rectangular(A), x @ A)
    torch.testing.assert_close(X @ Rectangular(A), X @ A)
    torch.testing.assert_close(X @ Rectangular(A.T).T, X @ A)
    with pytest.raises(ValueError, match="shape"):
        normal(5) @ Rectangular(A)
    with pytest.raises(TypeError):
        np.ones(3) @ Rectangular(A)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([0, 2], None),
        ([2, 0, 0], [4, 1, 4]),
        (slice(1, None), slice(None, None, 2)),
        (torch.tensor([True, False, True]), torch.tensor([-1, 0])),
        ([], [1]),
    ],
)
def test_sub_matrices_by_index(normal, rows, columns):
    A = normal(15).reshape(3, 5)
    if columns is None:
        A = A[:, :3]
    part = Rectangular(A).submatrix(rows, columns)
    to_index = lambda i: torch.tensor(i, dtype=torch.long) if isinstance(i, list) else i
    expected = A[to_index(rows)][:, to_index(rows if columns is None else columns)]
    assert part.shape == tuple(expected.shape)
    torch.testing.assert_close(part.to_dense(), expected)
    torch.testing.assert_close(part.T.to_dense(), expected.T)
    u = normal(expected.shape[1])
    torch.testing.assert_close(part @ u, expected @ u)
    torch.testing.assert_close(part.T @ normal(expected.shape[0]), expected.T @ normal(expected.shape[0]))


def test_indices_that_do_not_fit_are_refused(matrix):
    with pytest.raises(IndexError):
        DenseOperator(matrix).submatrix([4])
    with pytest.raises(IndexError, match="one-dimensional, of whole numbers"):
        DenseOperator(matrix).submatrix(torch.ones(2))


def test_repr_tells_size_and_dtype() -> None:
    assert repr(DenseOperator(torch.eye(1200))) == "<DenseOperator: 1,200 x 1,200, float32 on cpu>"
