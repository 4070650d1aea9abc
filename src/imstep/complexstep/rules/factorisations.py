"""Factorisations: the change of the factors from the change of the matrix.

    A = L Lᴴ          L' = L phi(L⁻¹ A' L⁻ᴴ),   phi: lower triangle with half the diagonal
    A = P L U         L' = L stril(M),  U' = triu(M) U,   M = L⁻¹ Pᵀ A' U⁻¹
    A = Q R           Q' = A' R⁻¹ - Q T,  R' = T R,   T = triu(X + Xᴴ) with half the diagonal, X = Qᴴ A' R⁻¹
    A = V diag(w) Vᴴ  w' = diag(Vᴴ A' V),  V' = V (F * Vᴴ A' V),   F_ij = 1/(w_j - w_i), 0 on the diagonal
    A = U diag(s) Vᴴ  s' = Re diag(P),  U' = U (sym(P s) / E) + (I - U Uᴴ) A' V / s,   P = Uᴴ A' V, E_ij = s_j² - s_i²

Eigenvectors and singular vectors are smooth only where the eigenvalues are distinct.

Source: M. Giles, An extended collection of matrix derivative results for forward and reverse mode algorithmic
differentiation (2008), section 3; Townsend, Differentiating the singular value decomposition (2016).
"""

from __future__ import annotations

from functools import cache

import torch

from imstep.complexstep.errors import ComplexStepError
from imstep.complexstep.registry import known, rule
from imstep.complexstep.rules.forms import dagger

aten = torch.ops.aten


def _half_diagonal(x):
    return x - torch.diag_embed(x.diagonal(0, -2, -1) / 2)


def _right_divided(x, upper, unitriangular=False):
    """X U⁻¹."""
    return torch.linalg.solve_triangular(upper, x, upper=True, left=False, unitriangular=unitriangular)


def _left_divided(lower, x, unitriangular=False):
    """L⁻¹ X."""
    return torch.linalg.solve_triangular(lower, x, upper=False, unitriangular=unitriangular)


# --- Cholesky ---------------------------------------------------------------------------------------------------


def _cholesky_push(factor, upper):
    lower = dagger(factor) if upper else factor

    def push(da):
        middle = _left_divided(lower, da)
        middle = dagger(_left_divided(lower, dagger(middle)))
        # As PyTorch does, a change of A counts through its Hermitian part.
        middle = (middle + dagger(middle)) / 2
        d = lower @ _half_diagonal(middle.tril())
        return dagger(d) if upper else d

    return push


@rule(aten.linalg_cholesky_ex.default, family="factorisation")
def cholesky_ex(a, *, upper=False, check_errors=False):
    factor, info = torch.linalg.cholesky_ex(a, upper=upper, check_errors=check_errors)
    push = _cholesky_push(factor, upper)
    return (factor, info), lambda da: (push(da), None)


@rule(*known("cholesky"), family="factorisation")
def cholesky(a, upper=False):
    factor = torch.linalg.cholesky(a, upper=upper)
    return factor, _cholesky_push(factor, upper)


# --- LU ---------------------------------------------------------------------------------------------------------


@cache
def _takes_transpose(factorise, device, dtype, contiguous):
    probe = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=dtype, device=device)
    lu, pivots = factorise(probe if contiguous else probe.mT.contiguous().mT)
    p, lower, upper = unpacked(lu, pivots)
    return bool((p @ lower @ upper - probe).abs().sum() > 1)


def lu_transposed(factorise, a):
    """Whether the factors that an operator gives, by ``factorise``, are those of the transpose of ``a``.

    PyTorch takes the one that lies in LAPACK's order, unsaid. The factors themselves do not tell for a symmetric
    matrix, so a matrix is tried that is none.
    """
    return _takes_transpose(factorise, a.device, a.dtype, a.is_contiguous())


def unpacked(lu, pivots):
    """P, L, U of a packed factorisation."""
    return torch.lu_unpack(lu, pivots)


def _lu_factors_change(p, lower, upper, da):
    """L', U' for a matrix of any shape: the leading square block first, then the rest of U or of L."""
    k = min(da.shape[-2:])
    permuted = p.mT.to(da.dtype) @ da if p is not None else da
    l1, u1 = lower[..., :k, :], upper[..., :, :k]
    middle = _right_divided(_left_divided(l1, permuted[..., :k, :k], unitriangular=True), u1)
    dl1, du1 = l1 @ middle.tril(-1), middle.triu() @ u1
    if da.size(-1) > k:
        rest = _left_divided(l1, permuted[..., :, k:] - dl1 @ upper[..., :, k:], unitriangular=True)
        return dl1, torch.cat([du1, rest], -1)
    if da.size(-2) > k:
        rest = _right_divided(permuted[..., k:, :] - lower[..., k:, :] @ du1, u1)
        return torch.cat([dl1, rest], -2), du1
    return dl1, du1


def lu_change(lu, pivots, da):
    """The change of the packed factors."""
    dl, du = _lu_factors_change(*unpacked(lu, pivots), da)
    m, n = da.shape[-2:]
    if m > n:
        return torch.cat([dl[..., :n, :] + du, dl[..., n:, :]], -2)
    return torch.cat([dl + du[..., :, :m], du[..., :, m:]], -1)


@rule(aten.linalg_lu_factor_ex.default, family="factorisation")
def lu_factor(a, *, pivot=True, check_errors=False):
    outputs = torch.linalg.lu_factor_ex(a, pivot=pivot, check_errors=check_errors)
    lu, pivots = outputs[:2]
    return tuple(outputs), lambda da: (lu_change(lu, pivots, da), None, None)


@rule(aten.linalg_lu.default, family="factorisation")
def lu(a, *, pivot=True):
    p, lower, upper = torch.linalg.lu(a, pivot=pivot)
    return (p, lower, upper), lambda da: (None, *_lu_factors_change(p if pivot else None, lower, upper, da))


@rule(aten.lu_unpack.default, family="linear")
def lu_unpack(packed, pivots, unpack_data=True, unpack_pivots=True):
    outputs = aten.lu_unpack(packed, pivots, unpack_data, unpack_pivots)
    k = min(packed.shape[-2:])

    def push(d, _):
        if not unpack_data:
            return None, None, None
        return None, d[..., :, :k].tril(-1), d[..., :k, :].triu()

    return tuple(outputs), push


# --- QR ---------------------------------------------------------------------------------------------------------


@rule(aten.linalg_qr.default, family="factorisation")
def qr(a, mode="reduced"):
    q, r = torch.linalg.qr(a, mode)
    m, n = a.shape[-2:]
    if mode == "r" or (mode == "complete" and m > n):
        raise ComplexStepError(
            f"qr with mode={mode!r} of a matrix of {m} rows and {n} columns has no derivative: "
            "Q is not determined by it. "
            "Use mode='reduced'."
        )
    k = min(m, n)
    r1 = r[..., :, :k]

    def push(da):
        scaled = _right_divided(da[..., :, :k], r1)
        x = dagger(q) @ scaled
        t = _half_diagonal((x + dagger(x)).triu())
        dq = scaled - q @ t
        if m >= n:
            return dq, t @ r
        return dq, dagger(dq) @ a + dagger(q) @ da

    return (q, r), push


# --- eigenvalues ------------------------------------------------------------------------------------------------


def _reciprocal_gaps(w):
    """1/(w_j - w_i), 0 on the diagonal."""
    gaps = w.unsqueeze(-2) - w.unsqueeze(-1)
    diagonal = torch.eye(w.size(-1), dtype=torch.bool, device=w.device)
    return torch.where(diagonal, 0, 1 / torch.where(diagonal, 1, gaps))


@rule(aten._linalg_eigh.default, family="factorisation")
def eigh(a, uplo="L", compute_v=True):
    outputs = aten._linalg_eigh(a, uplo, compute_v)
    w, v = outputs if compute_v else torch.linalg.eigh(a, uplo)
    gaps = _reciprocal_gaps(w)

    def push(da):
        # As PyTorch does, a change of A counts through its Hermitian part.
        middle = dagger(v) @ ((da + dagger(da)) / 2) @ v
        dw = middle.diagonal(0, -2, -1).real
        return dw, v @ (gaps * middle) if compute_v else None

    return tuple(outputs), push


def _lyapunov(w, v, right):
    """X of v diag(w) vᴴ X + X v diag(w) vᴴ = right."""
    return v @ (dagger(v) @ right @ v / (w.unsqueeze(-1) + w.unsqueeze(-2))) @ dagger(v)


@rule(*known("linalg_matrix_sqrth"), family="factorisation")  # as of PyTorch 2.14
def matrix_sqrth(a):
    w, v = torch.linalg.eigh(a)
    return torch.linalg.matrix_sqrth(a), lambda da: _lyapunov(w.sqrt(), v, (da + dagger(da)) / 2)


@rule(*known("linalg_polar"), family="factorisation")  # as of PyTorch 2.14
def polar(a):
    u, h = torch.linalg.polar(a)
    w, v = torch.linalg.eigh(h)

    def push(da):
        right = dagger(a) @ da
        dh = _lyapunov(w, v, right + dagger(right))
        return (da - u @ dh) @ (v / w.unsqueeze(-2)) @ dagger(v), dh

    return (u, h), push


@rule(aten.linalg_eig.default, family="factorisation")
def eig(a):
    """Eigenvectors keep unit norm: the part of V' along V that would change it is taken out."""
    w, v = torch.linalg.eig(a)
    gaps = _reciprocal_gaps(w)

    def push(da):
        middle = torch.linalg.solve(v, da.to(v.dtype) @ v)
        dv = v @ (gaps * middle)
        along = (v.conj_physical() * dv).real.sum(-2, keepdim=True)
        return middle.diagonal(0, -2, -1), dv - v * along

    return (w, v), push


# --- singular values --------------------------------------------------------------------------------------------


def _completed(basis, d_leading):
    """The change of a square unitary matrix from that of its leading columns, by keeping it unitary."""
    k = d_leading.size(-1)
    rest = basis[..., k:]
    return torch.cat([d_leading, -basis[..., :k] @ (dagger(d_leading) @ rest)], -1)


@rule(aten._linalg_svd.default, family="factorisation")
def svd(a, full_matrices=False, compute_uv=True, *, driver=None):
    outputs = aten._linalg_svd(a, full_matrices, compute_uv, driver=driver)
    u_full, s, vh_full = outputs if compute_uv else torch.linalg.svd(a, full_matrices=False)
    k = s.size(-1)
    u, v = u_full[..., :k], dagger(vh_full[..., :k, :])
    m, n = a.shape[-2:]
    squares = _reciprocal_gaps(s * s)

    def push(da):
        p = dagger(u) @ da @ v
        ds = p.diagonal(0, -2, -1).real
        if not compute_uv:
            return None, ds, None
        ps, sp = p * s.unsqueeze(-2), s.unsqueeze(-1) * p
        turn_u, turn_v = squares * (ps + dagger(ps)), squares * (sp + dagger(sp))
        if a.is_complex():  # the phase of each pair of vectors, shared between the two
            phase = torch.diag_embed(p.diagonal(0, -2, -1).imag / (2 * s) * 1j)
            turn_u, turn_v = turn_u + phase, turn_v - phase
        du, dv = u @ turn_u, v @ turn_v
        if m > k:
            outside = da @ v / s.unsqueeze(-2)
            du = du + outside - u @ (dagger(u) @ outside)
        if n > k:
            outside = dagger(da) @ u / s.unsqueeze(-2)
            dv = dv + outside - v @ (dagger(v) @ outside)
        if full_matrices:
            du, dv = _completed(u_full, du), _completed(dagger(vh_full), dv)
        return du, ds, dagger(dv)

    return tuple(outputs), push
