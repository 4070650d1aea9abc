"""Analytic functions of one number, entry by entry: f(x + i h x') = f(x) + i h f'(x) x' + O(h²).

Source of the derivatives: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), chapters 4 and 6 to 9.
"""

from __future__ import annotations

import math

import torch

from imstep.complexstep.registry import elementwise, rule

aten = torch.ops.aten

# Exponentials and logarithms.
elementwise(aten.exp.default, lambda x, y: y)
elementwise(aten.exp2.default, lambda x, y: y * math.log(2))
elementwise(aten.expm1.default, lambda x, y: y + 1)
elementwise(aten.log.default, lambda x, y: 1 / x)
elementwise(aten.log2.default, lambda x, y: 1 / (x * math.log(2)))
elementwise(aten.log10.default, lambda x, y: 1 / (x * math.log(10)))
elementwise(aten.log1p.default, lambda x, y: 1 / (1 + x))

# Roots.
elementwise(aten.sqrt.default, lambda x, y: 0.5 / y)
# Slopes of these leave the range of numbers before slope times change does.
elementwise(aten.rsqrt.default, lambda x, y: -0.5 * y / x, kernel=lambda dx, y: dx * y * (-0.5 * y) * y)
elementwise(aten.reciprocal.default, lambda x, y: -y * y, kernel=lambda dx, y: dx * y * -y)

# Circular and hyperbolic functions and their inverses.
elementwise(aten.sin.default, lambda x, y: torch.cos(x))
elementwise(aten.cos.default, lambda x, y: -torch.sin(x))
elementwise(aten.tan.default, lambda x, y: 1 + y * y)
elementwise(aten.asin.default, lambda x, y: torch.rsqrt(1 - x * x))
elementwise(aten.acos.default, lambda x, y: -torch.rsqrt(1 - x * x))
elementwise(aten.atan.default, lambda x, y: 1 / (1 + x * x))
elementwise(aten.sinh.default, lambda x, y: torch.cosh(x))
elementwise(aten.cosh.default, lambda x, y: torch.sinh(x))
elementwise(aten.tanh.default, lambda x, y: 1 - y * y, kernel=aten.tanh_backward.default)
elementwise(aten.asinh.default, lambda x, y: torch.rsqrt(x * x + 1))
# (x - 1)(x + 1) under one root would be real for x < -1, where the function is not; complex x needs the product.
elementwise(aten.acosh.default, lambda x, y: torch.rsqrt(x - 1) * torch.rsqrt(x + 1))
elementwise(aten.atanh.default, lambda x, y: 1 / (1 - x * x))


def sinc_slope(x, y):
    """(cos(pi x) - sinc(x)) / x, by its series where that cancels: -pi² x/3 + pi⁴ x³/30 - ..."""
    series = x * (-(math.pi**2) / 3 + (math.pi * x) ** 2 * (math.pi**2 / 30 - (math.pi * x) ** 2 * (math.pi**2 / 840)))
    near = x.abs() < 1e-2
    return torch.where(near, series, (torch.cos(math.pi * x) - y) / torch.where(near, torch.ones_like(x), x))


def sigmoid_on_complex(z):
    """Without overflow on either side."""
    right = z.real > 0
    decay = torch.exp(torch.where(right, -z, z))
    return torch.where(right, 1, decay) / (1 + decay)


def log_sigmoid_on_complex(z):
    """As :func:`sigmoid_on_complex`."""
    right = z.real > 0
    return torch.where(right, 0, z) - torch.log1p(torch.exp(torch.where(right, -z, z)))


elementwise(aten.sinc.default, sinc_slope)
elementwise(
    aten.sigmoid.default, lambda x, y: y * (1 - y), sigmoid_on_complex, kernel=aten.sigmoid_backward.default
)


def _logit_slope(x, y, eps=None):
    if eps is None:
        return 1 / (x * (1 - x))
    return torch.where((x >= eps) & (x <= 1 - eps), 1 / (x * (1 - x)), 0)


def _logit_on_complex(z, eps=None):
    if eps is not None:
        z = torch.where(z.real < eps, eps, torch.where(z.real > 1 - eps, 1 - eps, z))
    return torch.log(z) - torch.log1p(-z)


elementwise(aten.logit.default, _logit_slope, _logit_on_complex)
elementwise(aten.deg2rad.default, lambda x, y: math.pi / 180, lambda z: z * (math.pi / 180))
elementwise(aten.rad2deg.default, lambda x, y: 180 / math.pi, lambda z: z * (180 / math.pi))
elementwise(aten.frac.default, lambda x, y: 1, lambda z: torch.complex(torch.frac(z.real), z.imag))
elementwise(aten.square.default, lambda x, y: 2 * x)


@rule(aten.frexp.Tensor, family="piecewise")
def frexp(x):
    """x = mantissa * 2**exponent, the exponent being locally constant."""
    mantissa, exponent = torch.frexp(x)
    scale = torch.ldexp(torch.ones_like(x), -exponent)
    return (mantissa, exponent), lambda dx: (dx * scale, None)
