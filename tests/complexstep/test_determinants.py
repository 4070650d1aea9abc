"""Determinants at and near singular matrices: against closed forms, where PyTorch's LU gradient has no derivative."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

import imstep


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _with_singular_values(s: list[float], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    n = len(s)
    u, v = (torch.linalg.qr(_normal(n, n, seed=seed + i, dtype=dtype))[0] for i in (1, 2))
    return u @ torch.diag(torch.tensor(s, dtype=dtype)) @ v


def _leibniz(a: Tensor) -> Tensor:
    """The determinant as a polynomial; PyTorch's double backward is right on it."""
    total = a.new_zeros(())
    for order in permutations(range(a.shape[-1])):
        term = a.new_ones(())
        for i, j in enumerate(order):
            term = term * a[i, j]
        sign = (-1) ** sum(order[i] > order[j] for j in range(len(order)) for i in range(j))
        total = total + sign * term
    return total


def _double_backward(f, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    g = torch.autograd.grad(f(x), x, create_graph=True)[0]
    return torch.autograd.grad((g * v).sum(), x)[0]


SPECTRA = {
    "regular": [2.0, 1.0, 0.7, 0.5, 0.3],
    "rank-4": [2.0, 1.0, 0.7, 0.5, 0.0],
    "rank-3": [2.0, 1.0, 0.7, 0.0, 0.0],
    "rank-2": [2.0, 1.0, 0.0, 0.0, 0.0],
    "rank-1": [2.0, 0.0, 0.0, 0.0, 0.0],
    "zero": [0.0] * 5,
    "ill-conditioned": [2.0, 1.0, 0.7, 0.5, 1e-9],
    "graded": [1.0, 1e-4, 1e-8, 1e-12, 1e-16],
    "numerically singular": [2.0, 1.0, 0.7, 1e-17, 1e-17],
}
DETERMINANTS = {"linalg.det": torch.linalg.det, "det": torch.det, "Tensor.det": Tensor.det}


@pytest.mark.parametrize("h", [None, 1e-20])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_hessian_product(spectrum, h):
    a, v = _with_singular_values(SPECTRA[spectrum]), _normal(5, 5, seed=7)
    expected = _double_backward(lambda t: _leibniz(t) + _leibniz(t) ** 2, a, v)
    found = imstep.hvp(lambda t: torch.linalg.det(t) + torch.linalg.det(t) ** 2, a, v, h=h)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", DETERMINANTS)
def test_every_spelling_and_the_replay(name):
    a, v = _with_singular_values(SPECTRA["rank-4"]), _normal(5, 5, seed=7)
    w = a.clone().requires_grad_()
    hessian = imstep.Hessian(lambda: DETERMINANTS[name](w), [w])
    expected = _double_backward(_leibniz, a, v)
    torch.testing.assert_close((hessian @ v.reshape(-1)).reshape(5, 5), expected, rtol=1e-8, atol=1e-11)


def test_named_argument():
    a, v = _with_singular_values(SPECTRA["rank-4"]), _normal(5, 5, seed=7)
    found = imstep.hvp(lambda t: torch.linalg.det(A=t) + torch.det(input=t), a, v)
    torch.testing.assert_close(found, 2 * _double_backward(_leibniz, a, v), rtol=1e-8, atol=1e-11)


def test_exactly_singular_entries():
    """Small integers: the pivots are zero to the bit, or lifted by rounding."""
    a = torch.arange(16, dtype=torch.float64).reshape(4, 4)
    for matrix in (a, a @ a, torch.zeros(4, 4).double(), torch.ones(4, 4).double(), torch.eye(4).double().cumsum(0)):
        v = _normal(4, 4, seed=7)
        found, expected = imstep.hvp(torch.linalg.det, matrix, v), _double_backward(_leibniz, matrix, v)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_batches_mix_both():
    a = torch.stack([_with_singular_values(SPECTRA[k]) for k in ("regular", "rank-4", "rank-2", "zero")])
    a, v = a.reshape(2, 2, 5, 5), _normal(2, 2, 5, 5, seed=7)
    f = lambda det: lambda t: (det(t) * torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()).sum().exp()
    one_by_one = lambda t: torch.stack([_leibniz(m) for m in t.reshape(-1, 5, 5)]).reshape(2, 2)
    expected = _double_backward(f(one_by_one), a, v)
    torch.testing.assert_close(imstep.hvp(f(torch.linalg.det), a, v), expected, rtol=1e-8, atol=1e-10)


def test_single_precision():
    a, v = _with_singular_values(SPECTRA["rank-4"]), _normal(5, 5, seed=7)
    found = imstep.hvp(torch.linalg.det, a.float(), v.float())
    torch.testing.assert_close(found.double(), _double_backward(_leibniz, a, v), rtol=1e-4, atol=1e-5)


def test_complex_entries():
    a = _with_singular_values(SPECTRA["rank-4"], dtype=torch.complex128)
    parts, v = torch.view_as_real(a).contiguous(), _normal(5, 5, 2, seed=7)
    f = lambda det: lambda t: torch.view_as_real(det(torch.view_as_complex(t))).pow(2).sum() + det(
        torch.view_as_complex(t)
    ).real
    expected = _double_backward(f(_leibniz), parts, v)
    torch.testing.assert_close(imstep.hvp(f(torch.linalg.det), parts, v), expected, rtol=1e-8, atol=1e-11)


def test_third_derivatives():
    """A gradient inside the loss."""
    a, v = _with_singular_values(SPECTRA["rank-4"]), _normal(5, 5, seed=7)

    def f(det):
        def loss(t):
            x = t * 1.0 if t.requires_grad else t.clone().requires_grad_()
            return torch.autograd.grad(det(x), x, create_graph=True)[0].pow(2).sum()

        return loss

    expected = _double_backward(f(_leibniz), a, v)
    torch.testing.assert_close(imstep.hvp(f(torch.linalg.det), a, v), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spectrum", ["rank-4", "zero"])
def test_directional_derivative(spectrum):
    a, v = _with_singular_values(SPECTRA[spectrum]), _normal(5, 5, seed=7)
    expected = torch.func.jvp(_leibniz, (a,), (v,))
    torch.testing.assert_close(imstep.jvp(torch.linalg.det, (a,), (v,)), expected, rtol=1e-10, atol=1e-13)


TRANSFORMS = {
    "vmap": lambda det: lambda t: torch.vmap(det, in_dims=1)(t[:, None]).sum(),
    "grad": lambda det: lambda t: torch.func.grad(det)(t).pow(2).sum(),
    "vmap of grad": lambda det: lambda t: torch.vmap(torch.func.grad(det))(torch.stack([t, 2 * t])).pow(2).sum(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_within_a_transform_it_is_right_or_refused(name):
    transformed, v = TRANSFORMS[name], _normal(5, 5, seed=7)
    regular = _with_singular_values(SPECTRA["regular"])
    expected = _double_backward(transformed(_leibniz), regular, v)
    torch.testing.assert_close(imstep.hvp(transformed(torch.linalg.det), regular, v), expected, rtol=1e-8, atol=1e-9)
    for spectrum in ("rank-4", "rank-2", "zero", "numerically singular"):
        with pytest.raises(imstep.UnsupportedOperatorError, match="outside the transform"):
            imstep.hvp(transformed(torch.linalg.det), _with_singular_values(SPECTRA[spectrum]), v)


LOGARITHMS = {
    "slogdet": lambda t: torch.linalg.slogdet(t).logabsdet,
    "logdet": lambda t: torch.logdet(t * torch.linalg.slogdet(t).sign.detach()),
}


@pytest.mark.parametrize("name", LOGARITHMS)
def test_logarithm_near_a_singular_matrix(name):
    """-(A⁻¹ V A⁻¹)ᵀ, to what the condition number leaves."""
    s = [2.0, 1.0, 0.7, 0.5, 1e-5]
    a, v = _with_singular_values(s), _normal(5, 5, seed=7)
    u, vh = (torch.linalg.qr(_normal(5, 5, seed=i))[0] for i in (1, 2))
    inverse = vh.T @ torch.diag(1 / torch.tensor(s, dtype=torch.float64)) @ u.T
    expected = -(inverse @ v @ inverse).T
    found = imstep.hvp(LOGARITHMS[name], a, v)
    assert (found - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("name", LOGARITHMS)
def test_logarithm_of_a_singular_matrix_is_not_finite(name):
    a = torch.zeros(3, 3).double()
    a[0, 0] = a[1, 1] = 1.0
    assert not imstep.hvp(LOGARITHMS[name], a, _normal(3, 3)).isfinite().all()


SYMMETRIC = {"symmetric": _normal(4, 4) + _normal(4, 4).T + 6 * torch.eye(4), "identity": torch.eye(4).double()}
OF_SYMMETRIC = {
    "det": torch.linalg.det,
    "slogdet": lambda t: torch.linalg.slogdet(t).logabsdet.square(),
    "logdet": torch.logdet,
    "solve": lambda t: torch.linalg.solve(t, _normal(4, 2, seed=3)).square().sum(),
    "solve from the right": lambda t: torch.linalg.solve(t, _normal(2, 4, seed=3), left=False).square().sum(),
    "inverse": lambda t: torch.linalg.inv(t).square().sum(),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrix", SYMMETRIC)
@pytest.mark.parametrize("name", OF_SYMMETRIC)
def test_symmetric_matrices_moved_in_unsymmetric_directions(name, matrix, transposed):
    """Whether PyTorch has factorised the matrix or its transpose cannot be read off the factors."""
    f = OF_SYMMETRIC[name]
    g = (lambda t: f(t.mT)) if transposed else f
    a, v = SYMMETRIC[matrix], _normal(4, 4, seed=7)
    torch.testing.assert_close(imstep.hvp(g, a, v), _double_backward(g, a, v), rtol=1e-10, atol=1e-11)


# --- derivatives of derivatives ---------------------------------------------------------------------------------


def _along(f, x: Tensor, v: Tensor, times: int) -> Tensor:
    """A directional derivative of order ``times``."""
    if times == 0:
        return f(x)
    return imstep.jvp(lambda t: _along(f, t, v, times - 1), (x,), (v,))[1]


def _coefficients(a: Tensor, v: Tensor) -> Tensor:
    """det(A + t V) as a polynomial in t: sums over permutations of products of a_ij + t v_ij."""
    n = len(a)
    total = a.new_zeros(n + 5)
    for order in permutations(range(n)):
        term = torch.eye(1, n + 5, dtype=a.dtype)[0]
        for i, j in enumerate(order):
            term = a[i, j] * term + v[i, j] * term.roll(1)
        total += (-1) ** sum(order[i] > order[j] for j in range(n) for i in range(j)) * term
    return total


def _expected(a: Tensor, v: Tensor, times: int) -> Tensor:
    return math.factorial(times) * _coefficients(a, v)[times]


def _alike(n: int, seed: int = 0) -> dict[str, Tensor]:
    q = torch.linalg.qr(_normal(n, n, seed=seed))[0]
    spectrum = lambda *s: q @ torch.diag(torch.tensor([*s, *[3.0] * n][:n], dtype=torch.float64)) @ q.T
    return {
        "identity": torch.eye(n).double(),
        "scaled identity": 2 * torch.eye(n).double(),
        "orthogonal": q,
        "generic": _normal(n, n, seed=seed + 1),
        "repeated": spectrum(1.0, 1.0),
        "singular": spectrum(0.0, 1.0, 1.0),
        "repeated zero": spectrum(0.0, 0.0),
        "rank 1": torch.outer(*_normal(2, n, seed=seed + 2)),
        "zero": torch.zeros(n, n).double(),
        "ill-conditioned": spectrum(1e-9, 1e-5),
    }


# Past what takes the place of torch.linalg.det at a singular matrix, as from TorchScript, there is the rule alone.
ROUTES = {"function": torch.linalg.det, "operator": lambda a: torch.ops.aten._linalg_det(a)[0]}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", _alike(1))
def test_nested_derivatives(name, n, route):
    """det(A + t V) is a polynomial in t, whatever singular values A has."""
    a, v = _alike(n)[name], _normal(n, n, seed=7)
    for times in (1, 2, 3, 4):
        found = _along(ROUTES[route], a, v, times)
        torch.testing.assert_close(found, _expected(a, v, times), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", _alike(1))
def test_third_derivative(name):
    a, v = _alike(3)[name], _normal(3, 3, seed=7)
    square = lambda det: lambda t: det(t) + det(t) ** 2
    along = lambda f: lambda t: torch.func.jvp(f, (t,), (v,))[1]
    expected = along(along(torch.func.grad(square(_leibniz))))(a)
    found = imstep.third_derivative(square(torch.linalg.det), a, v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_nested_derivatives_of_batches(dtype):
    a = torch.stack([*_alike(3).values()]).reshape(2, 5, 3, 3).to(dtype)
    v = _normal(2, 5, 3, 3, seed=7).to(dtype) * (1 if dtype is torch.float32 else 1 + 0.5j)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-10
    for det in (torch.linalg.det, ROUTES["operator"]):
        for times in (2, 3):
            pairs = zip(a.reshape(-1, 3, 3), v.reshape(-1, 3, 3), strict=True)
            expected = torch.stack([_expected(*pair, times) for pair in pairs]).reshape(2, 5)
            torch.testing.assert_close(_along(det, a, v, times), expected, rtol=tolerance, atol=tolerance)


def test_nested_derivatives_of_a_larger_matrix():
    """By Jacobi's formula, in the power sums of the eigenvalues of A⁻¹V."""
    a, v = _alike(12)["repeated"] + torch.eye(12), _normal(12, 12, seed=7)
    x = torch.linalg.solve(a, v)
    p1, p2, p3 = (torch.trace(torch.linalg.matrix_power(x, k)) for k in (1, 2, 3))
    expected = torch.linalg.det(a) * (p1**3 - 3 * p1 * p2 + 2 * p3)
    torch.testing.assert_close(_along(torch.linalg.det, a, v, 3), expected, rtol=1e-10, atol=0)


def test_nested_derivative_of_block_structure():
    """Every singular value is there twice."""
    x, v = _normal(2, 2, seed=3), _normal(2, 2, seed=4)
    expected = _coefficients(torch.block_diag(x, x), torch.block_diag(v, v))[2] * 2
    found = _along(lambda t: torch.linalg.det(torch.block_diag(t, t)), x, v, 2)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
