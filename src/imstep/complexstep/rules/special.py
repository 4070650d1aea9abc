"""Special functions: error functions, gamma functions, Bessel functions.

Source of the derivatives: Abramowitz and Stegun (1964), 6.4 (polygamma), 6.5 (incomplete gamma), 7.1 (error function),
9.6 (modified Bessel functions), 23.2 (zeta).
"""

from __future__ import annotations

import math

import torch

from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.registry import elementwise, real_elementwise, rule

aten = torch.ops.aten
_TWO_OVER_ROOT_PI = 2 / math.sqrt(math.pi)


def erf_on_complex(z):
    """erf(x + iy) by its Taylor series about x, which converges everywhere; y is small here.

    erf^(n+1)(x) = 2/sqrt(pi) (-1)^n H_n(x) exp(-x²), with Hermite's H_(n+1) = 2x H_n - 2n H_(n-1).
    """
    x, y = z.real, z.imag
    re, im = torch.erf(x), torch.zeros_like(x)
    before, hermite = torch.zeros_like(x), torch.ones_like(x)
    term = _TWO_OVER_ROOT_PI * torch.exp(-x * x) * y  # y^(n+1) / (n+1)!
    for n in range(30):
        part = term * hermite * (-1) ** (n // 2)  # the sign of i^(n+1) (-1)^n, apart from i
        re, im = (re + part, im) if n % 2 else (re, im + part)
        before, hermite = hermite, 2 * x * hermite - 2 * n * before
        term = term * y / (n + 2)
    return torch.complex(re, im)


def _erfc_on_complex(z):
    w = erf_on_complex(z)
    return torch.complex(torch.erfc(z.real) - (w.real - torch.erf(z.real)), -w.imag)


elementwise(aten.erf.default, lambda x, y: _TWO_OVER_ROOT_PI * torch.exp(-x * x), erf_on_complex)
elementwise(aten.erfc.default, lambda x, y: -_TWO_OVER_ROOT_PI * torch.exp(-x * x), _erfc_on_complex)
real_elementwise(aten.erfinv.default, lambda x, y: torch.exp(y * y) / _TWO_OVER_ROOT_PI)
real_elementwise(aten.special_erfcx.default, lambda x, y: 2 * x * y - _TWO_OVER_ROOT_PI)
real_elementwise(aten.special_ndtri.default, lambda x, y: math.sqrt(2 * math.pi) * torch.exp(y * y / 2))


def _log_ndtr_slope(x, y):
    """pdf / cdf without underflow on the left and without overflow on the right."""
    right = x > 0
    left, far = (torch.where(side, x, 0) for side in (~right, right))
    by_density = torch.exp(-far * far / 2) / (math.sqrt(2 * math.pi) * torch.special.ndtr(far))
    return torch.where(right, by_density, math.sqrt(2 / math.pi) / torch.special.erfcx(-left / math.sqrt(2)))


real_elementwise(aten.special_log_ndtr.default, _log_ndtr_slope)
elementwise(
    aten.special_entr.default,
    lambda x, y: torch.where(x > 0, -torch.log(x) - 1, torch.inf),
    lambda z: -z * torch.log(z),
)


@rule(aten.special_ndtr.default, family="elementwise")
def ndtr(x):
    slope = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x), lambda dx: dx * slope


# --- gamma functions --------------------------------------------------------------------------------------------

real_elementwise(aten.lgamma.default, lambda x, y: torch.digamma(x))
real_elementwise(aten.digamma.default, lambda x, y: torch.polygamma(1, x))


@rule(aten.polygamma.default, family="elementwise")
def polygamma(n, x):
    slope = torch.polygamma(n + 1, x)
    return torch.polygamma(n, x), lambda dx: dx * slope


@rule(aten.mvlgamma.default, family="elementwise")
def mvlgamma(x, p):
    slope = sum(torch.digamma(x - j / 2) for j in range(p))
    return torch.mvlgamma(x, p), lambda dx: dx * slope


def _incomplete_gamma(op, sign):
    """d/dx P(a, x) = exp(-x) x^(a-1) / Gamma(a); with respect to a there is no closed form, nor one in PyTorch."""

    def incomplete(a, x):
        slope = sign * torch.exp((a - 1) * torch.log(x) - x - torch.lgamma(a))

        def push(da, dx):
            if da is not None:
                raise UnsupportedOperatorError(
                    op, "its derivative with respect to the parameter a is not elementary.", "Keep a constant."
                )
            return None if dx is None else dx * slope

        return op(a, x), push

    return incomplete


rule(aten.igamma.default, family="elementwise")(_incomplete_gamma(aten.igamma.default, 1))
rule(aten.igammac.default, family="elementwise")(_incomplete_gamma(aten.igammac.default, -1))


@rule(aten.special_zeta.default, family="elementwise")
def zeta(s, q):
    slope = -s * torch.special.zeta(s + 1, q)

    def push(ds, dq):
        if ds is not None:
            raise UnsupportedOperatorError(
                aten.special_zeta.default,
                "its derivative with respect to the exponent is not implemented.",
                "Keep it constant.",
            )
        return None if dq is None else dq * slope

    return torch.special.zeta(s, q), push


# --- modified Bessel functions ----------------------------------------------------------------------------------


def _over(y, x):
    """y / x for a function with y(x) = x/2 + O(x³), such as I_1 exp(-|x|)."""
    zero = x == 0
    return torch.where(zero, 0.5, y / torch.where(zero, 1, x))


def i1_over(x):
    """I_1(x) / x for |x| < 1 by its series, sum (x²/4)^k / (2 k! (k+1)!), smooth at 0 to all orders."""
    square, total = x * x / 4, torch.zeros_like(x)
    for k in reversed(range(12)):
        total = total * square + 0.5 / (math.factorial(k) * math.factorial(k + 1))
    return total


def _i1_slope(x, y):
    near = x.abs() < 1
    by_series = i1_over(torch.where(near, x, 0))
    return torch.special.i0(x) - torch.where(near, by_series, y / torch.where(near, 1, x))


real_elementwise(aten.i0.default, lambda x, y: torch.special.i1(x))
real_elementwise(aten.special_i0e.default, lambda x, y: torch.special.i1e(x) - torch.sgn(x) * y)
real_elementwise(aten.special_i1.default, _i1_slope)
real_elementwise(aten.special_i1e.default, lambda x, y: torch.special.i0e(x) - torch.sgn(x) * y - _over(y, x))
