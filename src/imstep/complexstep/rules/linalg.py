"""Inverses, linear systems and determinants, by perturbation of their defining equations.

    A X = B        =>   X' = A⁻¹ (B' - A' X)
    A A⁻¹ = I      =>   (A⁻¹)' = -A⁻¹ A' A⁻¹
    det A          =>   (det A)' = det A tr(A⁻¹ A')                                        (Jacobi)
    A⁺, rank fixed =>   A⁺' = -A⁺A'A⁺ + A⁺A⁺ᴴA'ᴴ(I - AA⁺) + (I - A⁺A)A'ᴴA⁺ᴴA⁺

Source: M. Giles, An extended collection of matrix derivative results for forward and reverse mode algorithmic
differentiation (2008), section 2; Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973), 413-432, theorem 4.3.
"""

from __future__ import annotations

import torch

from imstep.complexstep.determinants import adjugate
from imstep.complexstep.registry import defined_as, rule
from imstep.complexstep.rules.factorisations import lu_change, lu_transposed, unpacked
from imstep.complexstep.rules.forms import dagger, plus

aten = torch.ops.aten


def _trace_of_product(a, b):
    return (a.mT * b).sum((-2, -1))


def _minus(a, b):
    """a - b where either may be absent."""
    return a if b is None else -b if a is None else a - b


# --- inverses ---------------------------------------------------------------------------------------------------


@rule(aten.linalg_inv_ex.default, family="factorisation")
def inverse(a, *, check_errors=False):
    inv, info = torch.linalg.inv_ex(a, check_errors=check_errors)
    return (inv, info), lambda da: (-inv @ da @ inv, None)


def pseudo_inverse_change(a, pinv, da):
    """A⁺' for a change of A that keeps its rank."""
    left = dagger(pinv) @ pinv if a.size(-2) >= a.size(-1) else None
    change = -pinv @ da @ pinv
    dah = dagger(da)
    within = pinv @ dagger(pinv) @ dah
    change = change + within - within @ a @ pinv
    outside = dah @ (dagger(pinv) @ pinv if left is None else left)
    return change + outside - pinv @ (a @ outside)


@rule(aten.linalg_pinv.atol_rtol_tensor, family="factorisation")
def pseudo_inverse(a, *, atol=None, rtol=None, hermitian=False):
    pinv = aten.linalg_pinv.atol_rtol_tensor(a, atol=atol, rtol=rtol, hermitian=hermitian)
    return pinv, lambda da, *_: pseudo_inverse_change(a, pinv, da)


@rule(aten.cholesky_inverse.default, family="factorisation")
def cholesky_inverse(factor, upper=False):
    """(L Lᴴ)⁻¹ from L."""
    inv = torch.cholesky_inverse(factor, upper)
    lower = dagger(factor.triu()) if upper else factor.tril()

    def push(d):
        d = dagger(d.triu()) if upper else d.tril()
        half = d @ dagger(lower)
        return -inv @ (half + dagger(half)) @ inv

    return inv, push


# --- linear systems ---------------------------------------------------------------------------------------------


def _as_columns(b, a):
    """A vector right-hand side, by PyTorch's convention for solve, as one column."""
    vector = b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])
    return b.unsqueeze(-1) if vector else b, vector


def _factors_of_solve(a):
    return aten._linalg_solve_ex(a, torch.eye(a.size(-1), dtype=a.dtype, device=a.device))[1:3]


@rule(aten._linalg_solve_ex.default, family="factorisation")
def solve(a, b, *, left=True, check_errors=False):
    outputs = aten._linalg_solve_ex(a, b, left=left, check_errors=check_errors)
    x, lu, pivots, _ = outputs
    transposed = lu_transposed(_factors_of_solve, a)
    _, vector = _as_columns(b, a)
    wide = x.unsqueeze(-1) if vector else x

    def push(da, db):
        d_lu = None if da is None else lu_change(lu, pivots, da.mT if transposed else da)
        db = db.unsqueeze(-1) if vector and db is not None else db
        by_a = None if da is None else (da @ wide if left else wide @ da)
        change = _minus(db, by_a)
        dx = torch.linalg.lu_solve(lu, pivots, change.expand(wide.shape), left=left, adjoint=transposed)
        return (dx.squeeze(-1) if vector else dx), d_lu, None, None

    return tuple(outputs), push


@rule(aten.linalg_lu_solve.default, family="factorisation")
def lu_solve(lu, pivots, b, *, left=True, adjoint=False):
    x = torch.linalg.lu_solve(lu, pivots, b, left=left, adjoint=adjoint)
    p, lower, upper = unpacked(lu, pivots)

    def push(d_lu, _, db):
        by_a = None
        if d_lu is not None:
            da = p @ (d_lu.tril(-1) @ upper + lower @ d_lu.triu())
            da = dagger(da) if adjoint else da
            by_a = da @ x if left else x @ da
        return torch.linalg.lu_solve(lu, pivots, _minus(db, by_a).expand(x.shape), left=left, adjoint=adjoint)

    return x, push


@rule(aten.cholesky_solve.default, family="factorisation")
def cholesky_solve(b, factor, upper=False):
    x = torch.cholesky_solve(b, factor, upper)
    lower = dagger(factor.triu()) if upper else factor.tril()

    def push(db, d):
        by_factor = None
        if d is not None:
            half = (dagger(d.triu()) if upper else d.tril()) @ dagger(lower)
            by_factor = (half + dagger(half)) @ x
        return torch.cholesky_solve(_minus(db, by_factor).expand(x.shape), factor, upper)

    return x, push


def _triangle(d, upper, unitriangular):
    return d.triu(1 if unitriangular else 0) if upper else d.tril(-1 if unitriangular else 0)


@rule(aten.linalg_solve_triangular.default, family="factorisation")
def solve_triangular(a, b, *, upper, left=True, unitriangular=False):
    solve = lambda rhs: torch.linalg.solve_triangular(a, rhs, upper=upper, left=left, unitriangular=unitriangular)
    x = solve(b)

    def push(da, db):
        by_a = None
        if da is not None:
            da = _triangle(da, upper, unitriangular)
            by_a = da @ x if left else x @ da
        return solve(_minus(db, by_a).expand(x.shape))

    return x, push


@rule(aten.triangular_solve.default, family="factorisation")
def triangular_solve(b, a, upper=True, transpose=False, unitriangular=False):
    outputs = aten.triangular_solve(b, a, upper, transpose, unitriangular)
    x = outputs[0]

    def push(db, da):
        by_a = None
        if da is not None:
            by_a = (_triangle(da, upper, unitriangular).mT if transpose else _triangle(da, upper, unitriangular)) @ x
        change = _minus(db, by_a).expand(x.shape)
        return aten.triangular_solve(change, a, upper, transpose, unitriangular)[0], da

    return tuple(outputs), push


@rule(aten.linalg_lstsq.default, family="factorisation")
def least_squares(a, b, rcond=None, *, driver=None):
    """X = A⁺ B for full rank; the residuals |B - A X|² change by -2 Re (B - A X)ᴴ (A' X - B')."""
    outputs = aten.linalg_lstsq(a, b, rcond, driver=driver)
    pinv = torch.linalg.pinv(a)
    columns, vector = _as_columns(b, a)
    x, residuals = outputs[0], outputs[1]
    wide = x.unsqueeze(-1) if vector else x
    rest = columns - a @ wide

    def push(da, db):
        db = db.unsqueeze(-1) if vector and db is not None else db
        dx = plus(
            None if db is None else pinv @ db,
            None if da is None else pseudo_inverse_change(a, pinv, da) @ columns,
        )
        d_residuals = None
        if residuals.numel():
            change = _minus(db, None if da is None else da @ wide)
            d_residuals = 2 * (rest.conj_physical() * change).real.sum(-2)
        return (dx.squeeze(-1) if vector else dx), d_residuals, None, None

    return tuple(outputs), push


# --- determinants -----------------------------------------------------------------------------------------------


def _adjugate(a):
    """det(A) A⁻¹ without the inverse: by the singular values, so that it is right for a singular A.

    Singular vectors have no derivative where values are equal: within another arithmetic by what has.
    """
    if torch._C._len_torch_dispatch_stack():
        return adjugate(a)
    u, s, vh = torch.linalg.svd(a)
    n = s.size(-1)
    rows = s.unsqueeze(-2).expand(*s.shape, n)
    others = torch.where(torch.eye(n, dtype=torch.bool, device=a.device), 1, rows).prod(-1)
    phase = torch.linalg.det(u) * torch.linalg.det(vh)
    return phase[..., None, None] * (dagger(vh) * others.unsqueeze(-2).to(a.dtype)) @ dagger(u)


def _factors_of_det(a):
    return aten._linalg_det(a)[1:]


def _factors_of_slogdet(a):
    return aten._linalg_slogdet(a)[2:]


@rule(aten._linalg_det.default, family="factorisation")
def determinant(a):
    outputs = aten._linalg_det(a)
    _, lu, pivots = outputs
    adjugate = _adjugate(a)
    transposed = lu_transposed(_factors_of_det, a)
    # The factors of a singular matrix have no derivative. It should not come to here, but be taken by
    # imstep.complexstep.determinants; should it come in another way, not a number is better than a wrong one.
    pivot = lu.diagonal(0, -2, -1).abs()
    singular = (pivot <= 1e3 * torch.finfo(a.dtype).eps * pivot.amax(-1, keepdim=True)).any(-1) if a.numel() else None

    def push(da):
        d_lu = lu_change(lu, pivots, da.mT if transposed else da)
        d_lu = d_lu if singular is None else torch.where(singular[..., None, None], torch.nan, d_lu)
        return _trace_of_product(adjugate, da), d_lu, None

    return tuple(outputs), push


@rule(aten._linalg_slogdet.default, family="factorisation")
def sign_and_log_determinant(a):
    outputs = aten._linalg_slogdet(a)
    sign, _, lu, pivots = outputs
    inv = torch.linalg.inv_ex(a)[0]
    transposed = lu_transposed(_factors_of_slogdet, a)

    def push(da):
        trace = _trace_of_product(inv, da)
        d_sign = sign * (trace.imag * 1j) if a.is_complex() else None
        d_log = trace.real if a.is_complex() else trace
        return d_sign, d_log, lu_change(lu, pivots, da.mT if transposed else da), None

    return tuple(outputs), push


# --- products of reflections ------------------------------------------------------------------------------------


def _reflector(reflectors, i):
    v = reflectors[..., :, i]
    m = v.size(-1)
    position = torch.arange(m, device=v.device)
    return torch.where(position < i, 0, torch.where(position == i, 1, v)).unsqueeze(-1)


@defined_as(aten.linalg_householder_product.default)
def householder_product(reflectors, tau):
    """H_1 ... H_k applied to the first columns of the identity, H_i = I - tau_i v_i v_iᴴ."""
    m, n = reflectors.shape[-2:]
    q = torch.eye(m, n, dtype=reflectors.dtype, device=reflectors.device).expand(reflectors.shape)
    for i in reversed(range(tau.size(-1))):
        v = _reflector(reflectors, i)
        q = q - tau[..., i, None, None] * v @ (dagger(v) @ q)
    return q


@defined_as(aten.ormqr.default)
def multiply_by_reflections(reflectors, tau, other, left=True, transpose=False):
    """Q C, Qᴴ C, C Q or C Qᴴ with Q = H_1 ... H_k."""
    order = range(tau.size(-1))
    y = other
    for i in order if left == transpose else reversed(order):
        v = _reflector(reflectors, i)
        t = tau[..., i, None, None]
        t = t.conj_physical() if transpose else t
        y = y - t * v @ (dagger(v) @ y) if left else y - t * (y @ v) @ dagger(v)
    return y


@rule(aten.linalg_matrix_exp.default, family="factorisation")
def matrix_exponential(a):
    """The Frechet derivative stands above the diagonal of exp([[A, A'], [0, A]]).

    Source: Higham, Functions of Matrices (2008), theorem 3.6 and (3.16).
    """

    def push(da):
        # The algorithm scales by the norm; a perturbation of the size of A itself does not change its accuracy.
        scale = da.abs().amax().clamp_min(torch.finfo(da.dtype).tiny) / a.abs().amax().clamp_min(1e-3)
        upper = torch.cat([a, da / scale], -1)
        lower = torch.cat([torch.zeros_like(a), a], -1)
        n = a.size(-1)
        return torch.linalg.matrix_exp(torch.cat([upper, lower], -2))[..., :n, n:] * scale

    return torch.linalg.matrix_exp(a), push
