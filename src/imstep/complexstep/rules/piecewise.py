"""Operators that choose by the real part and carry the imaginary part along.

At a tie PyTorch shares the gradient; the imaginary part is shared in the same way.
"""

from __future__ import annotations

import torch

from imstep.complexstep.registry import exact, rule
from imstep.complexstep.rules.forms import plus, times, total

aten = torch.ops.aten


def _chosen(condition, d):
    return None if d is None else torch.where(condition, d, 0)


# --- absolute value and sign ------------------------------------------------------------------------------------


@rule(aten.abs.default, family="piecewise", finite=exact)
def absolute(x):
    sign = torch.sgn(x)
    if x.is_complex():  # |z| has the derivative Re(conj(z) z') / |z|
        return torch.abs(x), lambda dx: (sign.conj_physical() * dx).real
    return torch.abs(x), lambda dx: dx * sign


@rule(aten.sgn.default, family="piecewise", finite=exact)
def sgn(x):
    y = torch.sgn(x)
    if not x.is_complex():
        return y, None
    inverse = torch.where(x == 0, 0, 1 / torch.abs(x))
    return y, lambda dx: (dx - y * (y.conj_physical() * dx).real) * inverse


@rule(aten.angle.default, family="piecewise", finite=exact)
def angle(x):
    if not x.is_complex():
        return torch.angle(x), None
    inverse = torch.where(x == 0, 0, 1 / x)
    return torch.angle(x), lambda dx: (dx * inverse).imag


@rule(aten.nextafter.default, family="piecewise", finite=exact)
def nextafter(x, y):
    return torch.nextafter(x, y), lambda dx, dy: dx


@rule(aten.nan_to_num.default, family="piecewise", finite=exact)
def nan_to_num(x, nan=None, posinf=None, neginf=None):
    finite = torch.isfinite(x)
    return torch.nan_to_num(x, nan, posinf, neginf), lambda dx: torch.where(finite, dx, 0)


# --- clamp and where --------------------------------------------------------------------------------------------


@rule(aten.clamp.default, family="piecewise", finite=exact)
def clamp(x, low=None, high=None):
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    if low is not None:
        inside = x >= low
    if high is not None:
        inside = inside & (x <= high)
    return torch.clamp(x, low, high), lambda dx: torch.where(inside, dx, 0)


@rule(aten.clamp_min.default, family="piecewise", finite=exact)
def clamp_min(x, low):
    inside = x >= low
    return torch.clamp_min(x, low), lambda dx: torch.where(inside, dx, 0)


@rule(aten.clamp_max.default, family="piecewise", finite=exact)
def clamp_max(x, high):
    inside = x <= high
    return torch.clamp_max(x, high), lambda dx: torch.where(inside, dx, 0)


@rule(aten.clamp.Tensor, family="piecewise", finite=exact)
def clamp_tensor(x, low=None, high=None):
    y = torch.clamp(x, low, high)
    below = None if low is None else x < low
    above = None if high is None else x > high
    if low is not None and high is not None:  # where the bounds cross, the upper one wins
        below, above = below & (low < high), above | (high < low)
    outside = below if above is None else above if below is None else below | above

    def push(dx, dlow, dhigh):
        by_x = None if dx is None else torch.where(outside, 0, dx)
        return total(by_x, _chosen(below, dlow), _chosen(above, dhigh))

    return y, push


@rule(aten.clamp_min.Tensor, family="piecewise", finite=exact)
def clamp_min_tensor(x, low):
    inside = x >= low
    return torch.clamp_min(x, low), lambda dx, dlow: plus(_chosen(inside, dx), _chosen(~inside, dlow))


@rule(aten.clamp_max.Tensor, family="piecewise", finite=exact)
def clamp_max_tensor(x, high):
    inside = x <= high
    return torch.clamp_max(x, high), lambda dx, dhigh: plus(_chosen(inside, dx), _chosen(~inside, dhigh))


@rule(aten.where.self, family="piecewise", finite=exact)
def where(condition, x, y):
    def push(_, dx, dy):
        return torch.where(condition, 0 if dx is None else dx, 0 if dy is None else dy)

    return torch.where(condition, x, y), push


# --- the larger and the smaller of two --------------------------------------------------------------------------


def _extreme(op, before):
    """Entries from x where ``before(x, y)``, half from each at a tie."""

    def extreme(x, y):
        share = torch.where(x == y, 0.5, before(x, y).to(torch.result_type(x, y)))
        return op(x, y), lambda dx, dy: plus(times(dx, share), times(dy, 1 - share))

    return extreme


rule(aten.maximum.default, family="piecewise", finite=exact)(_extreme(torch.maximum, torch.gt))
rule(aten.minimum.default, family="piecewise", finite=exact)(_extreme(torch.minimum, torch.lt))


def _extreme_number(op, before):
    """As fmax and fmin do: the number where the other entry is none; the first one at a tie."""

    def extreme(x, y):
        first = before(x, y) | torch.isnan(y)
        return op(x, y), lambda dx, dy: plus(_chosen(first, dx), _chosen(~first, dy))

    return extreme


rule(aten.fmax.default, family="piecewise", finite=exact)(_extreme_number(torch.fmax, torch.ge))
rule(aten.fmin.default, family="piecewise", finite=exact)(_extreme_number(torch.fmin, torch.le))


# --- extremes along dimensions ----------------------------------------------------------------------------------


def expanded(y, dim, keepdim):
    """A reduction's result in the shape it has with keepdim, so that it broadcasts against the argument."""
    if keepdim:
        return y
    for d in sorted(d % (y.dim() + len(dim)) for d in dim):
        y = y.unsqueeze(d)
    return y


def shared_extreme(x, y, dim, keepdim):
    """The linear map of an extreme value over ``dim``: the mean over the entries that attain it."""
    dims = tuple(dim) if dim else tuple(range(x.dim()))
    if x.dim() == 0:
        return lambda dx: dx
    attained = x == expanded(y, dims, keepdim)
    weights = attained / attained.sum(dims, keepdim=True)
    weights = weights.to(x.dtype)
    return lambda dx: (dx * weights).sum(dims, keepdim=keepdim)


def _extreme_over(op):
    def extreme(x, dim=(), keepdim=False):
        y = op(x, dim, keepdim)
        return y, shared_extreme(x, y, dim, keepdim)

    return extreme


rule(aten.amax.default, family="piecewise", finite=exact)(_extreme_over(torch.amax))
rule(aten.amin.default, family="piecewise", finite=exact)(_extreme_over(torch.amin))
for _op in (aten.max.default, aten.min.default):
    rule(_op, family="piecewise", finite=exact)(
        lambda x, op=_op: (lambda y: (y, shared_extreme(x, y, (), False)))(op(x))
    )


@rule(aten.aminmax.default, family="piecewise", finite=exact)
def aminmax(x, *, dim=None, keepdim=False):
    outputs = torch.aminmax(x, dim=dim, keepdim=keepdim) if dim is not None else torch.aminmax(x)
    dims = () if dim is None else (dim,)
    if dim is None and keepdim:
        outputs = torch.aminmax(x, keepdim=True)
    low, high = (shared_extreme(x, y, dims, keepdim) for y in outputs)
    return tuple(outputs), lambda dx: (low(dx), high(dx))
