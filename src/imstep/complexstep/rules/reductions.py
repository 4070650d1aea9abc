"""Products, norms, moments and log-sums along dimensions."""

from __future__ import annotations

import math

import torch

from imstep.complexstep.registry import defined_as, exact, linear, rule
from imstep.complexstep.rules.forms import evaluated, times, total
from imstep.complexstep.rules.piecewise import expanded, shared_extreme

aten = torch.ops.aten

linear(aten.trace.default)


@rule(aten.nansum.default, family="linear", finite=exact)
def nansum(x, dim=None, keepdim=False, *, dtype=None):
    number = ~torch.isnan(x)
    return torch.nansum(x, dim, keepdim, dtype=dtype), lambda dx: torch.where(number, dx, 0).sum(
        dim, keepdim, dtype=dtype
    )


# --- products ---------------------------------------------------------------------------------------------------


def _without_dtype(op):
    """A real dtype asked for would cut the imaginary part off."""
    return lambda *args, dtype=None: op(*args)


def products_of_others(x, dim):
    """prod over j != i of x_j along ``dim``, at every i, by running products from both ends: zeros do no harm."""
    ones = torch.ones_like(x.narrow(dim, 0, 1))
    n = x.size(dim)
    before = torch.cat([ones, x.narrow(dim, 0, n - 1)], dim).cumprod(dim)
    after = torch.cat([ones, x.flip(dim).narrow(dim, 0, n - 1)], dim).cumprod(dim).flip(dim)
    return before * after


@rule(aten.prod.default, family="multilinear", finite=evaluated(_without_dtype(torch.prod)))
def prod(x, *, dtype=None):
    if x.numel() == 0:
        return torch.prod(x, dtype=dtype), None
    others = products_of_others(x.reshape(-1), 0).reshape(x.shape)
    return torch.prod(x, dtype=dtype), lambda dx: (dx * others).sum(dtype=dtype)


@rule(aten.prod.dim_int, family="multilinear", finite=evaluated(_without_dtype(torch.prod)))
def prod_dim(x, dim, keepdim=False, *, dtype=None):
    y = torch.prod(x, dim, keepdim, dtype=dtype)
    if x.numel() == 0:
        return y, None
    if x.dim() == 0:
        return y, lambda dx: dx
    others = products_of_others(x, dim)
    return y, lambda dx: (dx * others).sum(dim, keepdim, dtype=dtype)


@rule(aten.cumprod.default, family="multilinear", finite=evaluated(_without_dtype(torch.cumprod)))
def cumprod(x, dim, *, dtype=None):
    """y_i = y_(i-1) x_i, so y_i' = sum over j <= i of x_j' times the product of the others up to i.

    Without zeros y_i' = y_i cumsum(x'/x)_i. A zero would divide by itself: after the first zero only x' there counts.
    """
    y = torch.cumprod(x, dim, dtype=dtype)
    if x.dim() == 0 or x.numel() == 0:
        return y, lambda dx: dx
    zero = x == 0
    earlier = zero.cumsum(dim)
    first = zero & (earlier == 1)
    kept = torch.where(zero, 1, x)
    without_first = torch.where(first, 1, x).cumprod(dim, dtype=dtype)

    def push(dx):
        smooth = y * torch.where(zero, 0, dx / kept).cumsum(dim)
        at_zero = without_first * torch.where(first, dx, 0).cumsum(dim)
        return smooth + at_zero

    return y, push


# --- norms ------------------------------------------------------------------------------------------------------


def _reciprocal(y):
    """1/y, and 0 where y is 0: PyTorch's subgradient of a norm at the origin."""
    return torch.where(y == 0, 0, 1 / y)


def _norm_map(x, y, p, dim, keepdim):
    """The linear map of y = (sum |x|^p)^(1/p)."""
    dims = tuple(dim) if dim is not None and len(dim) else tuple(range(x.dim()))
    wide = expanded(y, dims, keepdim)
    # conj(sgn x) x' is the change of |x| where x is complex: its real part.
    signed = (lambda dx: (torch.sgn(x).conj_physical() * dx).real) if x.is_complex() else (lambda dx: torch.sgn(x) * dx)
    if p == 0:
        return None
    if math.isinf(p):
        pick = shared_extreme(x.abs(), y, dims, keepdim)
        return lambda dx: pick(signed(dx))
    if p == 1:
        weights = None
    elif p == 2:
        weights = x.conj_physical() * _reciprocal(wide)
        if x.is_complex():
            return lambda dx: (weights * dx).real.sum(dims, keepdim=keepdim)
        return lambda dx: (weights * dx).sum(dims, keepdim=keepdim)
    elif p < 1:
        weights = torch.where(x == 0, 0, x.abs() ** (p - 1)) * wide ** (1 - p)
    else:
        weights = x.abs() ** (p - 1) * torch.where(wide == 0, 0, wide ** (1 - p))
    return lambda dx: times(signed(dx), 1 if weights is None else weights).sum(dims, keepdim=keepdim)


def _norm_on_complex(z, p=2, dim=None, keepdim=False, **_):
    dims = tuple(dim) if dim is not None and len(dim) else tuple(range(z.dim()))
    if p == 2 or p is None:
        return torch.sqrt((z * z).sum(dims, keepdim=keepdim))
    magnitude = torch.where(z.real < 0, -z, z)
    if p == 0:
        return (magnitude.real != 0).to(z.dtype).sum(dims, keepdim=keepdim)
    if math.isinf(p):
        extreme = torch.amax if p > 0 else torch.amin
        at = magnitude.real == extreme(magnitude.real, dims, keepdim=True)
        return torch.where(at, magnitude, 0).sum(dims, keepdim=keepdim) / at.sum(dims, keepdim=keepdim)
    return torch.pow(torch.pow(magnitude, p).sum(dims, keepdim=keepdim), 1 / p)


@rule(aten.linalg_vector_norm.default, family="reduction", finite=evaluated(_norm_on_complex))
def vector_norm(x, p=2, dim=None, keepdim=False, *, dtype=None):
    y = torch.linalg.vector_norm(x, p, dim, keepdim, dtype=dtype)
    x = x if dtype is None else x.to(dtype)
    return y, _norm_map(x, y, float(p), dim, keepdim)


@rule(aten.norm.Scalar, aten.norm.ScalarOpt_dim, family="reduction", finite=evaluated(_norm_on_complex))
def norm(x, p=2, dim=None, keepdim=False):
    p = 2.0 if p is None else float(p)
    y = torch.linalg.vector_norm(x, p, dim, keepdim)
    return y, _norm_map(x, y, p, dim, keepdim)


@rule(aten.norm.ScalarOpt_dim_dtype, family="reduction")
def norm_dtype(x, p, dim, keepdim=False, *, dtype):
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)


# --- moments ----------------------------------------------------------------------------------------------------


def _moments(x, dim, correction):
    dims = tuple(dim) if dim is not None and len(dim) else tuple(range(x.dim()))
    n = math.prod(x.size(d) for d in dims) if x.dim() else 1
    freedom = n - (1 if correction is None else correction)
    centred = x - x.mean(dims, keepdim=True)
    return dims, centred, freedom


def _ratio(a, b):
    return a / b if b else math.nan if a == 0 else math.inf


def _inner(a, dx):
    return (a.conj_physical() * dx).real if a.is_complex() else a * dx


def _var_on_complex(z, dim=None, *, correction=None, keepdim=False):
    dims, centred, freedom = _moments(z, dim, correction)
    return (centred * centred).sum(dims, keepdim=keepdim) * _ratio(1.0, max(freedom, 0))


def _var_mean_on_complex(z, dim=None, *, correction=None, keepdim=False):
    dims, _, _ = _moments(z, dim, correction)
    return _var_on_complex(z, dim, correction=correction, keepdim=keepdim), z.mean(dims, keepdim=keepdim)


def _std_mean_on_complex(z, dim=None, *, correction=None, keepdim=False):
    variance, mean = _var_mean_on_complex(z, dim, correction=correction, keepdim=keepdim)
    return torch.sqrt(variance), mean


@rule(aten.var.correction, family="reduction", finite=evaluated(_var_on_complex))
def var(x, dim=None, *, correction=None, keepdim=False):
    dims, centred, freedom = _moments(x, dim, correction)
    scale = _ratio(2.0, max(freedom, 0))
    y = torch.var(x, dim, correction=correction, keepdim=keepdim)
    # The mean's own change drops out: the centred values sum to zero.
    return y, lambda dx: _inner(centred, dx).sum(dims, keepdim=keepdim) * scale


@rule(aten.std.correction, family="reduction", finite=evaluated(lambda *a, **k: torch.sqrt(_var_on_complex(*a, **k))))
def std(x, dim=None, *, correction=None, keepdim=False):
    dims, centred, freedom = _moments(x, dim, correction)
    y = torch.std(x, dim, correction=correction, keepdim=keepdim)
    scale = torch.where(y == 0, 0, _ratio(1.0, max(freedom, 0)) / y)
    return y, lambda dx: _inner(centred, dx).sum(dims, keepdim=keepdim) * scale


def _with_mean(moment):
    def pair(x, dim=None, *, correction=None, keepdim=False):
        y, push = moment(x, dim, correction=correction, keepdim=keepdim)
        dims = tuple(dim) if dim is not None and len(dim) else tuple(range(x.dim()))
        return (y, x.mean(dims, keepdim=keepdim)), lambda dx: (push(dx), dx.mean(dims, keepdim=keepdim))

    return pair


rule(aten.var_mean.correction, family="reduction", finite=evaluated(_var_mean_on_complex))(_with_mean(var))
rule(aten.std_mean.correction, family="reduction", finite=evaluated(_std_mean_on_complex))(_with_mean(std))


# --- logarithms of sums -----------------------------------------------------------------------------------------


def _logsumexp_on_complex(z, dim, keepdim=False):
    largest = z.real.amax(dim, keepdim=True)
    largest = torch.where(torch.isfinite(largest), largest, 0)
    y = torch.log(torch.exp(z - largest).sum(dim, keepdim=True)) + largest
    return y if keepdim else y.squeeze(tuple(dim))


@rule(aten.logsumexp.default, family="reduction", finite=evaluated(_logsumexp_on_complex))
def logsumexp(x, dim, keepdim=False):
    y = torch.logsumexp(x, dim, keepdim)
    dims = tuple(dim) if len(dim) else tuple(range(x.dim()))
    wide = expanded(y, dims, keepdim)
    shares = torch.exp(x - torch.where(torch.isfinite(wide.real if wide.is_complex() else wide), wide, 0))
    return y, lambda dx: (dx * shares).sum(dims, keepdim=keepdim)


@rule(aten.logcumsumexp.default, family="reduction")
def logcumsumexp(x, dim):
    """y_i' = sum over j <= i of exp(x_j - y_i) x_j'; the sum is kept in range by a common shift."""
    y = torch.logcumsumexp(x, dim)
    if x.dim() == 0 or x.numel() == 0:
        return y, lambda dx: dx
    n = x.size(dim)
    rows, columns = y.movedim(dim, -1).unsqueeze(-1), x.movedim(dim, -1).unsqueeze(-2)
    earlier = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    shares = torch.where(earlier & ~torch.isneginf(rows.real if x.is_complex() else rows), torch.exp(columns - rows), 0)
    return y, lambda dx: (shares @ dx.movedim(dim, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, dim)


# --- renormalised slices ----------------------------------------------------------------------------------------


@rule(aten.renorm.default, family="reduction")
def renorm(x, p, dim, maxnorm):
    """Slices along ``dim`` with a norm n above the bound are scaled by bound / (n + 1e-7), as in PyTorch's kernel."""
    dims = tuple(d for d in range(x.dim()) if d != dim % x.dim())
    n = torch.linalg.vector_norm(x, p, dims, keepdim=True)
    change = _norm_map(x, n, float(p), dims, True)
    above = n > maxnorm
    scale = torch.where(above, maxnorm / (n + 1e-7), 1)
    slope = torch.where(above, -scale / (n + 1e-7), 0)
    return torch.renorm(x, p, dim, maxnorm), lambda dx: dx * scale + x * (slope * change(dx))


@rule(aten.dist.default, family="reduction", finite=evaluated(lambda x, y, p=2: _norm_on_complex(x - y, p)))
def dist(x, y, p=2):
    value = torch.dist(x, y, p)
    push = _norm_map(x - y, value, float(p), None, False)
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return value, lambda dx, dy: push(total(dx, None if dy is None else -dy).expand(shape))


@defined_as(aten._weight_norm_interface_backward.default)
def weight_norm_backward(gw, v, g, norms, dim):
    """Of w = g v/|v|, the norms being taken over all dimensions but ``dim``."""
    dims = [d for d in range(v.dim()) if d != dim]
    along = (gw * v).sum(dims, keepdim=True) / norms
    return g / norms * (gw - v * (along / norms)), along
