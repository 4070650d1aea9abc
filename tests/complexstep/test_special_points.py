"""Derivatives at the points where PyTorch's gradient formulas are guarded, and in the tails, against mpmath."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import imstep

F64 = torch.float64
REAL = (-math.inf, math.inf)
POSITIVE = (0.0, math.inf)
POINTS = (0.0, -0.0, 1e-3, 0.5, -0.5, 1.0, -1.0, 2.0, -3.0, 20.0, -20.0, 40.0, -40.0, 100.0, -100.0, 1000.0, -1000.0)


def full(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value)


def sigmoid(z):
    return 1 / (1 + mp.exp(-z))


def normal(z):
    return mp.erfc(-z / mp.sqrt(2)) / 2


def bent(z):
    """tanh(softplus(z))."""
    return 1 - 2 / ((1 + mp.exp(z)) ** 2 + 1)


# Name: the function, the same in mpmath, where it is smooth (open), and the absolute error that rounding allows.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable, tuple[float, float], float]] = {
    "exp": (torch.exp, mp.exp, (-700, 700), 0),
    "exp2": (torch.exp2, lambda z: mp.mpf(2) ** z, (-900, 900), 0),
    "expm1": (torch.expm1, mp.expm1, (-700, 700), 1e-15),
    "log": (torch.log, mp.log, POSITIVE, 0),
    "log2": (torch.log2, lambda z: mp.log(z, 2), POSITIVE, 0),
    "log10": (torch.log10, lambda z: mp.log(z, 10), POSITIVE, 0),
    "log1p": (torch.log1p, lambda z: mp.log(1 + z), (-1, math.inf), 0),
    "sqrt": (torch.sqrt, mp.sqrt, POSITIVE, 0),
    "rsqrt": (torch.rsqrt, lambda z: 1 / mp.sqrt(z), POSITIVE, 0),
    "reciprocal": (torch.reciprocal, lambda z: 1 / z, POSITIVE, 0),
    "sin": (torch.sin, mp.sin, REAL, 1e-15),
    "cos": (torch.cos, mp.cos, REAL, 1e-15),
    "tan": (torch.tan, mp.tan, REAL, 0),
    "asin": (torch.asin, mp.asin, (-1, 1), 0),
    "acos": (torch.acos, mp.acos, (-1, 1), 0),
    "atan": (torch.atan, mp.atan, REAL, 1e-15),
    "sinh": (torch.sinh, mp.sinh, (-700, 700), 0),
    "cosh": (torch.cosh, mp.cosh, (-700, 700), 0),
    "tanh": (torch.tanh, mp.tanh, REAL, 1e-15),
    "asinh": (torch.asinh, mp.asinh, REAL, 0),
    "acosh": (torch.acosh, mp.acosh, (1, math.inf), 0),
    "atanh": (torch.atanh, mp.atanh, (-1, 1), 0),
    "sinc": (torch.sinc, mp.sincpi, REAL, 1e-14),
    "sigmoid": (torch.sigmoid, sigmoid, REAL, 1e-15),
    "logit": (torch.logit, lambda z: mp.log(z / (1 - z)), (0, 1), 1e-12),
    "square": (torch.square, lambda z: z * z, REAL, 0),
    "erf": (torch.erf, mp.erf, REAL, 0),
    "erfc": (torch.erfc, mp.erfc, REAL, 0),
    "erfinv": (torch.erfinv, mp.erfinv, (-1, 1), 1e-12),
    "ndtri": (torch.special.ndtri, lambda p: mp.sqrt(2) * mp.erfinv(2 * p - 1), (0, 1), 1e-7),
    "ndtr": (torch.special.ndtr, normal, REAL, 1e-15),
    "log_ndtr": (torch.special.log_ndtr, lambda z: mp.log(normal(z)), (-30, math.inf), 1e-11),
    "entr": (torch.special.entr, lambda z: -z * mp.log(z), POSITIVE, 0),
    "lgamma": (torch.lgamma, mp.loggamma, POSITIVE, 1e-14),
    "digamma": (torch.digamma, mp.digamma, POSITIVE, 1e-13),
    "polygamma": (lambda t: torch.polygamma(2, t), lambda z: mp.polygamma(2, z), POSITIVE, 1e-13),
    "i0": (torch.special.i0, lambda z: mp.besseli(0, z), (-200, 200), 1e-13),
    "i1": (torch.special.i1, lambda z: mp.besseli(1, z), (-200, 200), 1e-13),
    "silu": (F.silu, lambda z: z * sigmoid(z), REAL, 0),
    "gelu": (F.gelu, lambda z: z * normal(z), (-15, math.inf), 0),
    "mish": (F.mish, lambda z: z * bent(z), REAL, 0),
    "softplus": (lambda t: F.softplus(t, threshold=2000), lambda z: mp.log1p(mp.exp(z)), (-math.inf, 700), 0),
    "logsigmoid": (F.logsigmoid, lambda z: -mp.log1p(mp.exp(-z)), REAL, 0),
    "elu": (F.elu, lambda z: mp.expm1(z), (-math.inf, 0), 0),
    "selu": (F.selu, lambda z: 1.7580993408473766 * mp.expm1(z), (-600, 0), 0),
    "celu": (lambda t: F.celu(t, 2.0), lambda z: 2 * mp.expm1(z / 2), (-math.inf, 0), 0),
    "softsign": (F.softsign, lambda z: z / (1 + z), POSITIVE, 1e-15),
    "tanhshrink": (F.tanhshrink, lambda z: z - mp.tanh(z), REAL, 1e-15),
    "logaddexp": (lambda t: torch.logaddexp(t, full(0.0)(t)), lambda z: mp.log1p(mp.exp(z)), (-700, 700), 0),
    "logaddexp2": (lambda t: torch.logaddexp2(0 * t, t), lambda z: mp.log(1 + mp.mpf(2) ** z, 2), (-700, 700), 0),
    "logaddexp of nothing": (lambda t: torch.logaddexp(t, full(-math.inf)(t)), lambda z: z, REAL, 0),
    "xlogy by x": (lambda t: torch.xlogy(t, full(2.0)(t)), lambda z: z * mp.log(2), REAL, 0),
    "xlogy by y": (lambda t: torch.xlogy(full(2.0)(t), t), lambda z: 2 * mp.log(z), POSITIVE, 0),
    "xlogy of 0": (lambda t: torch.xlogy(full(0.0)(t), t), lambda z: 0 * z, POSITIVE, 0),
    "xlogy at 0": (lambda t: torch.xlogy(t, 1 + t), lambda z: z * mp.log(1 + z), (-1, math.inf), 0),
    "xlog1py": (lambda t: torch.special.xlog1py(t, t), lambda z: z * mp.log(1 + z), (-1, math.inf), 0),
    "power of itself": (lambda t: torch.pow(t, t), lambda z: z**z, (0, 50), 0),
    "2 ** x": (lambda t: torch.pow(2.0, t), lambda z: mp.mpf(2) ** z, (-900, 900), 0),
    "(1 + x) ** x": (lambda t: (1 + t) ** t, lambda z: (1 + z) ** z, (-1, 50), 0),
    "(3 + x) ** (x - 1)": (lambda t: (3 + t) ** (t - 1), lambda z: (3 + z) ** (z - 1), (-2, 50), 0),
    "(3 + x) ** (x + 1)": (lambda t: (3 + t) ** (t + 1), lambda z: (3 + z) ** (z + 1), (-2.5, 50), 0),
    "float_power": (lambda t: torch.float_power(2 + t, t), lambda z: (2 + z) ** z, (-2, 50), 0),
    "hypot": (lambda t: torch.hypot(t, full(3.0)(t)), lambda z: mp.sqrt(z * z + 9), REAL, 1e-15),
    "atan2 by y": (lambda t: torch.atan2(t, full(3.0)(t)), lambda z: mp.atan(z / 3), REAL, 1e-15),
    "atan2 by x": (lambda t: torch.atan2(full(3.0)(t), t), lambda z: -mp.atan(z / 3), REAL, 1e-15),
    "logsumexp": (
        lambda t: torch.logsumexp(torch.stack([t, full(0.0)(t), full(-math.inf)(t)]), 0),
        lambda z: mp.log1p(mp.exp(z)),
        (-700, 700),
        1e-15,
    ),
    "log_softmax": (lambda t: torch.stack([t, 0 * t]).log_softmax(0)[0], lambda z: -mp.log1p(mp.exp(-z)), REAL, 1e-15),
    "softmax": (lambda t: torch.stack([t, 0 * t]).softmax(0)[0], sigmoid, REAL, 1e-15),
    "glu": (lambda t: F.glu(torch.stack([t, t]), 0)[0], lambda z: z * sigmoid(z), REAL, 1e-14),
    "cross entropy with logits": (
        lambda t: F.binary_cross_entropy_with_logits(t, full(0.3)(t), reduction="none"),
        lambda z: mp.log1p(mp.exp(z)) - mp.mpf(0.3) * z,
        (-700, 700),
        1e-15,
    ),
    "soft margin": (
        lambda t: F.soft_margin_loss(t, full(1.0)(t), reduction="none"),
        lambda z: mp.log1p(mp.exp(-z)),
        (-700, 700),
        1e-15,
    ),
    "divergence of 0": (lambda t: F.kl_div(t, full(0.0)(t), reduction="none"), lambda z: 0 * z, REAL, 0),
    "huber within": (lambda t: F.huber_loss(t, full(0.0)(t), reduction="none"), lambda z: z * z / 2, (-1, 1), 0),
    "product with a zero": (lambda t: torch.stack([t, t + 1, t - 1]).prod(0), lambda z: z * (z * z - 1), REAL, 0),
    "running product": (
        lambda t: torch.stack([t, t + 1, t, t - 1]).cumprod(0).sum(0),
        lambda z: z + z * (z + 1) + z * z * (z + 1) + z * z * (z * z - 1),
        (-50, 50),
        0,
    ),
    "variance of equals": (lambda t: torch.stack([t, t, 2 * t, 2 * t]).var(0), lambda z: z * z / 3, (-50, 50), 1e-14),
    **{
        f"power {p}": (lambda t, p=p: t**p, lambda z, p=p: z**p, REAL if p >= 0 and p == int(p) else POSITIVE, 0)
        for p in (0, 1, 2, 3, 4, -1, -2, 0.5, 1.5, 2.5)
    },
    **{
        f"power tensor {p}": (lambda t, p=p: t ** full(p)(t), lambda z, p=p: z**p, REAL if p != 1.5 else POSITIVE, 0)
        for p in (0.0, 1.0, 2.0, 3.0, 1.5)
    },
}


def exact(reference: Callable, at: float, order: int) -> float:
    with mp.workdps(80):
        return float(mp.re(mp.diff(reference, mp.mpf(at), order, h=mp.mpf(10) ** -16)))


# What sigmoid's derivative, taken from its value, loses below rounding, shows in derivatives of derivatives.
FAINT = {"logsigmoid", "softplus", "silu", "mish", "logaddexp", "logaddexp2"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise(name: str) -> None:
    f, reference, (low, high), slack = FUNCTIONS[name]
    points = [p for p in POINTS if low < p < high]
    x, ones = torch.tensor(points, dtype=F64), torch.ones(len(points), dtype=F64)
    total = lambda t: f(t).sum()
    nested = 1e-15 if name in FAINT else slack
    for order, found, bound in (
        (1, imstep.derivative(f, x), slack),
        (1, imstep.jvp(f, (x,), (ones,))[1], slack),
        (2, imstep.hvp(total, x, ones), slack),
        (2, imstep.jvp(lambda t: imstep.derivative(f, t), (x,), (ones,))[1], nested),
        (3, imstep.third_derivative(total, x, ones), nested),
    ):
        expected = torch.tensor([exact(reference, p, order) for p in points], dtype=F64)
        assert ((found - expected).abs() <= 1e-7 * expected.abs() + max(bound, 1e-22)).all(), (order, found, expected)


SINGLE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "reciprocal": (lambda p: 1 / p, lambda p: 2 / p**3),
    "rsqrt": (torch.rsqrt, lambda p: 0.75 * p**-2.5),
    "power": (lambda p: p**-0.5, lambda p: 0.75 * p**-2.5),
    "atan2": (lambda p: torch.atan2(p, 2 * p.detach()), lambda p: -0.16 / p**2),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("at", [1e-9, 1e12])
def test_second_derivatives_of_large_numbers_in_single_precision(name: str, at: float) -> None:
    """Where slopes of slopes leave the range of float32, and second derivatives do not."""
    f, second = SINGLE[name]
    p = torch.tensor(at)
    assert float(imstep.hvp(f, p, torch.ones_like(p))) == pytest.approx(second(at), rel=1e-5)
