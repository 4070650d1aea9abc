"""Analytic functions of several numbers, entry by entry: f(x + ihx', y + ihy') = f + ih (f_x x' + f_y y') + O(h²).

A part that is absent costs nothing. In finite arithmetic the formula itself is evaluated on complex numbers, written so
that a tiny imaginary part survives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imstep.complexstep.registry import exact, rule
from imstep.complexstep.rules.forms import evaluated, plus, times, total

aten = torch.ops.aten

# --- quotients --------------------------------------------------------------------------------------------------


@rule(aten.div.Tensor, family="elementwise", finite=evaluated(torch.div))
def divide(x, y):
    quotient = torch.div(x, y)

    def push(dx, dy):
        if dy is None:
            return dx / y
        return (-quotient * dy if dx is None else torch.addcmul(dx, quotient, dy, value=-1)) / y

    return quotient, push


@rule(aten.div.Scalar, family="linear", finite=exact)
def divide_scalar(x, c):
    return torch.div(x, c), lambda dx: dx / c


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode, family="elementwise", finite=exact)
def divide_rounded(x, y, *, rounding_mode):
    if rounding_mode is None:
        return divide(x, y)
    return torch.div(x, y, rounding_mode=rounding_mode), None


@rule(aten.addcdiv.default, family="elementwise", finite=evaluated(torch.addcdiv))
def addcdiv(x, a, b, *, value=1):
    quotient, push_quotient = divide(a, b)

    def push(dx, da, db):
        return dx if da is None and db is None else plus(dx, value * push_quotient(da, db))

    return torch.add(x, quotient, alpha=value), push


def _remainder(op, rounding):
    """x - y round(x/y): piecewise linear in x and y."""

    def remainder(x, y):
        def push(dx, dy=None):
            if dy is None:
                return dx
            return plus(dx, -dy * torch.div(x, y, rounding_mode=rounding))

        return op(x, y), push

    return remainder


rule(aten.fmod.Tensor, aten.fmod.Scalar, family="piecewise", finite=exact)(_remainder(torch.fmod, "trunc"))
rule(aten.remainder.Tensor, aten.remainder.Scalar, family="piecewise", finite=exact)(
    _remainder(torch.remainder, "floor")
)


@rule(aten.remainder.Scalar_Tensor, family="piecewise", finite=exact)
def remainder_of_number(c, y):
    return torch.remainder(c, y), lambda dy: -dy * torch.div(c, y, rounding_mode="floor")


# --- powers -----------------------------------------------------------------------------------------------------


def _integer_power(z, n):
    """z**n by squaring: torch.pow takes a logarithm, which loses the imaginary part of a negative base."""
    result = None
    for bit in range(n.bit_length()):
        z = z * z if bit else z
        if n >> bit & 1:
            result = z if result is None else result * z
    return torch.ones_like(z) if result is None else result


def power_on_complex(z, c):
    """z**c for a complex z near the real axis and a number c; not a number where the real power is not."""
    if float(c).is_integer() and abs(c) <= 256:
        w = _integer_power(z, abs(int(c)))
        return 1 / w if c < 0 else w
    w = torch.pow(z, c)
    return torch.where(z.real < 0, torch.complex(*[torch.full_like(z.real, torch.nan)] * 2), w)


@rule(aten.pow.Tensor_Scalar, family="elementwise", finite=evaluated(power_on_complex))
def power(x, c):
    if c == 0:
        return torch.pow(x, c), None
    y = torch.pow(x, c)
    if c < 0:  # the slope may leave the range of numbers before its product does
        rate = c / x
        return y, lambda dx: dx * y * rate
    slope = 2 * x if c == 2 else c * torch.pow(x, c - 1)
    return y, lambda dx: dx * slope


def _log(x):
    """The logarithm of a tensor, or of a number in double precision; not a number below zero."""
    if isinstance(x, Tensor):
        return torch.log(x)
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _powers_on_complex(z, e):
    if not isinstance(z, Tensor) or not z.is_complex():
        return torch.exp(e * _log(z))
    negative = z.real < 0
    magnitude = torch.exp(e * torch.log(torch.where(negative, -z, z)))
    if e.is_complex():
        return torch.where(negative, torch.nan, magnitude)
    odd = torch.remainder(e, 2) == 1
    signed = torch.where(negative & odd, -magnitude, magnitude)
    return torch.where(negative & (e != torch.round(e)), torch.nan, signed)


@rule(aten.pow.Tensor_Tensor, family="elementwise", finite=evaluated(_powers_on_complex))
def power_tensor(x, e):
    y = torch.pow(x, e)

    def push(dx, de):
        by_base = None if dx is None else dx * torch.where((e == 0) & (x == 0), 0, e * torch.pow(x, e - 1))
        if de is None:
            return by_base
        # 0**e is constant in e for e > 0; PyTorch extends that to e = 0.
        nonnegative = e.real >= 0 if e.is_complex() else e >= 0
        return plus(by_base, de * torch.where((x == 0) & nonnegative, 0, y * torch.log(x)))

    return y, push


@rule(aten.pow.Scalar, family="elementwise", finite=evaluated(_powers_on_complex))
def power_of_number(c, e):
    y = torch.pow(c, e)
    slope = (
        torch.where(e >= 0, 0, y * -math.inf)
        if c == 0
        else y * torch.log(torch.as_tensor(c, dtype=y.dtype, device=y.device))
    )
    return y, lambda de: de * slope


# --- angles and distances ---------------------------------------------------------------------------------------


def _atan2_on_complex(y, x):
    # The angle at the real parts, plus the small angle from there.
    x0, y0 = (t.real if t.is_complex() else t for t in (x, y))
    return torch.atan2(y0, x0) + torch.atan((y * x0 - x * y0) / (x * x0 + y * y0))


@rule(aten.atan2.default, family="elementwise", finite=evaluated(_atan2_on_complex))
def atan2(y, x):
    length = torch.hypot(x, y)  # squares leave the range of numbers sooner
    # PyTorch's gradient at the origin is zero.
    scale = torch.where(length == 0, 0, 1 / length)
    by_y, by_x = x * scale, -y * scale
    return torch.atan2(y, x), lambda dy, dx: scale * total(times(dy, by_y), times(dx, by_x))


@rule(aten.hypot.default, family="elementwise", finite=evaluated(lambda x, y: torch.sqrt(x * x + y * y)))
def hypot(x, y):
    length = torch.hypot(x, y)
    return length, lambda dx, dy: total(times(dx, x / length), times(dy, y / length))


@rule(aten.copysign.Tensor, aten.copysign.Scalar, family="piecewise", finite=exact)
def copysign(x, other):
    y = torch.copysign(x, other)
    slope = torch.where(x == 0, 0, torch.sgn(x) * torch.sgn(y))
    return y, lambda dx, _=None: times(dx, slope)


@rule(aten.ldexp.Tensor, family="elementwise")
def ldexp(x, exponent):
    y = torch.ldexp(x, exponent)
    scale = torch.pow(2.0, exponent)
    return y, lambda dx, de: total(times(dx, scale), times(de, y * math.log(2)))


# --- logarithms of sums and products ----------------------------------------------------------------------------


def _logaddexp_on_complex(x, y):
    largest = torch.maximum(*(t.real if t.is_complex() else t for t in (x, y)))
    return largest + torch.log(torch.exp(x - largest) + torch.exp(y - largest))


@rule(aten.logaddexp.default, family="elementwise", finite=evaluated(_logaddexp_on_complex))
def logaddexp(x, y):
    share = torch.sigmoid(x - y) if not x.is_complex() else 1 / (1 + torch.exp(y - x))
    return torch.logaddexp(x, y), lambda dx, dy: total(times(dx, share), times(dy, 1 - share))


@rule(aten.logaddexp2.default, family="elementwise")
def logaddexp2(x, y):
    share = torch.sigmoid((x - y) * math.log(2))
    return torch.logaddexp2(x, y), lambda dx, dy: total(times(dx, share), times(dy, 1 - share))


def _is_tensor(t):
    return isinstance(t, Tensor)


def _x_log(op, log, shift):
    """x log(y + shift), zero where x is zero and the logarithm is not a number."""

    def x_log(x, y):
        def push(*ims):
            dx, dy = _by_argument((x, y), ims)
            by_x = None
            if dx is not None:
                logarithm = log(torch.as_tensor(y, dtype=dx.dtype, device=dx.device))
                by_x = dx * torch.where(
                    (torch.as_tensor(x) == 0) & (logarithm.isnan() | logarithm.isinf()), 0, logarithm
                )
            return plus(by_x, None if dy is None else dy * (x / (y + shift)))

        return op(x, y), push

    return x_log


def _by_argument(arguments, ims):
    """One imaginary part per argument, None for a number, which the schema does not count as a tensor."""
    left = iter(ims)
    return tuple(next(left) if _is_tensor(a) else None for a in arguments)


def _xlogy_on_complex(x, y):
    return x * _log(y)


def _xlog1py_on_complex(x, y):
    return x * (torch.log1p(y) if isinstance(y, Tensor) else math.log1p(y))


rule(
    aten.xlogy.Tensor,
    aten.xlogy.Scalar_Other,
    aten.xlogy.Scalar_Self,
    family="elementwise",
    finite=evaluated(_xlogy_on_complex),
)(_x_log(torch.xlogy, torch.log, 0))
rule(
    aten.special_xlog1py.default,
    aten.special_xlog1py.other_scalar,
    aten.special_xlog1py.self_scalar,
    family="elementwise",
    finite=evaluated(_xlog1py_on_complex),
)(_x_log(torch.special.xlog1py, torch.log1p, 1))


# --- products and sums in one -----------------------------------------------------------------------------------


@rule(aten.addcmul.default, family="multilinear", finite=evaluated(torch.addcmul))
def addcmul(x, a, b, *, value=1):
    def push(dx, da, db):
        product = total(times(da, b), times(db, a))
        return dx if product is None else plus(dx, product if value == 1 else product * value)

    return torch.addcmul(x, a, b, value=value), push


@rule(aten.lerp.Scalar, family="linear", finite=exact)
def lerp_scalar(start, end, weight):
    return torch.lerp(start, end, weight), lambda ds, de: total(times(ds, 1 - weight), times(de, weight))


@rule(
    aten.lerp.Tensor, family="multilinear", finite=evaluated(lambda start, end, weight: start + weight * (end - start))
)
def lerp(start, end, weight):
    def push(ds, de, dw):
        by_weight = None if dw is None else dw * (end - start)
        return total(times(ds, 1 - weight), times(de, weight), by_weight)

    return torch.lerp(start, end, weight), push
