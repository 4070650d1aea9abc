"""Activation functions and their backward operators.

A smooth activation has a slope f' and a curvature f''. Its backward operator (g, x) -> g f'(x) is differentiated
in turn:

    d(g f'(x)) = g' f'(x) + g f''(x) x'

PyTorch's fused backward kernel, applied to ones, gives f' in one pass. In finite arithmetic backward operators are
decomposed.
"""

from __future__ import annotations

import math

import torch

from imstep.complexstep.registry import elementwise, exact, rule
from imstep.complexstep.rules.elementwise import log_sigmoid_on_complex, sigmoid_on_complex
from imstep.complexstep.rules.forms import evaluated, plus, plus_times_, shared, times
from imstep.complexstep.rules.special import erf_on_complex

aten = torch.ops.aten

_ROOT_HALF = math.sqrt(0.5)


def _smooth(forward, backward, curvature, on_complex=None):
    """The rules of an activation and of its backward operator; ``curvature(x, *parameters)`` is f''."""

    def slope(x, *args, **kwargs):
        ones = x.new_ones(()).expand(x.shape)
        return shared((backward, args, *kwargs.items()), x, lambda: backward(ones, x, *args, **kwargs))

    elementwise(forward, lambda x, y, *args, **kwargs: slope(x, *args, **kwargs), on_complex)

    @rule(backward, family="elementwise")
    def backward_rule(g, x, *args, **kwargs):
        by_x = curvature(x, *args, **kwargs).mul_(g)
        f1 = slope(x, *args, **kwargs)
        return g * f1, lambda dg, dx: plus_times_(times(dg, f1), dx, by_x)


def gelu_curvature(x, *, approximate="none"):
    if approximate == "none":
        square = x * x
        bell = (square / -2).exp_()
        return square.neg_().add_(2).mul_(bell).mul_(1 / math.sqrt(2 * math.pi))
    k, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (x + a * x**3))
    u1, u2 = k * (1 + 3 * a * x * x), 6 * k * a * x
    return (1 - t * t) * (u1 + 0.5 * x * (u2 - 2 * t * u1 * u1))


def _gelu_on_complex(z, *, approximate="none"):
    if approximate == "none":
        return 0.5 * z * (1 + erf_on_complex(z * _ROOT_HALF))
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)))


def silu_curvature(x):
    s, c = torch.sigmoid(x), torch.sigmoid(-x)  # 1 - s would lose the tail
    return s * c * (2 + x * (c - s))


def mish_curvature(x):
    """With c = exp(-softplus(x)) the hyperbolic tangent of softplus is (1 - c²) / (1 + c²), and 1 - c = s."""
    s, c = torch.sigmoid(x), torch.sigmoid(-x)
    k = 1 / (1 + c * c)
    return (2 * c * k).square() * s * (2 + x * (c - 2 * s * s * (1 + c) * k))


def softplus_curvature(x, beta=1, threshold=20):
    return torch.where(beta * x > threshold, 0, beta * torch.sigmoid(beta * x) * torch.sigmoid(-beta * x))


def _softplus_on_complex(z, beta=1, threshold=20):
    return torch.where(beta * z.real > threshold, z, -log_sigmoid_on_complex(-beta * z) / beta)


def hardswish_curvature(x):
    return ((x > -3) & (x < 3)).to(x.dtype) / 3


def _hardswish_on_complex(z):
    return torch.where(z.real <= -3, torch.zeros_like(z), torch.where(z.real >= 3, z, z * (z + 3) / 6))


def _mish_on_complex(z):
    return z * torch.tanh(_softplus_on_complex(z))


_smooth(aten.gelu.default, aten.gelu_backward.default, gelu_curvature, _gelu_on_complex)
_smooth(aten.silu.default, aten.silu_backward.default, silu_curvature, lambda z: z * sigmoid_on_complex(z))
_smooth(aten.mish.default, aten.mish_backward.default, mish_curvature, _mish_on_complex)
_smooth(aten.hardswish.default, aten.hardswish_backward.default, hardswish_curvature, _hardswish_on_complex)


def _softplus_slope(x, y, beta=1, threshold=20):
    return torch.where(beta * x > threshold, 1, torch.sigmoid(beta * x))


elementwise(aten.softplus.default, _softplus_slope, _softplus_on_complex)


@rule(aten.softplus_backward.default, family="elementwise")
def softplus_backward(g, x, beta, threshold):
    f1 = _softplus_slope(x, None, beta, threshold)
    by_x = g * softplus_curvature(x, beta, threshold)
    return g * f1, lambda dg, dx: plus(times(dg, f1), times(dx, by_x))


# --- given by their results -------------------------------------------------------------------------------------


@rule(aten.tanh_backward.default, family="elementwise")
def tanh_backward(g, y):
    if y.is_complex():  # autograd conjugates the derivative; a conjugate has no complex derivative
        f1 = 1 - y * y
        return g * f1.conj_physical(), lambda dg, dy: plus(
            times(dg, f1.conj_physical()), None if dy is None else dy.conj_physical() * (-2 * g * y.conj_physical())
        )
    kernel = aten.tanh_backward.default
    by_y = (g * y).mul_(-2)
    return kernel(g, y), lambda dg, dy: plus_times_(None if dg is None else kernel(dg, y), dy, by_y)


@rule(aten.sigmoid_backward.default, family="elementwise")
def sigmoid_backward(g, y):
    if y.is_complex():
        c = y.conj_physical()
        f1, by_c = c * (1 - c), g * (1 - 2 * c)
        return g * f1, lambda dg, dy: plus(times(dg, f1), None if dy is None else dy.conj_physical() * by_c)
    kernel = aten.sigmoid_backward.default
    by_y = torch.addcmul(g, g, y, value=-2)
    return kernel(g, y), lambda dg, dy: plus_times_(None if dg is None else kernel(dg, y), dy, by_y)


@rule(
    aten.log_sigmoid_forward.default,
    family="elementwise",
    finite=evaluated(lambda z: (log_sigmoid_on_complex(z), z.real.new_empty(0))),
)
def log_sigmoid(x):
    # Not sigmoid(-x), whose own derivative, taken further out, loses the left tail.
    slope = torch.exp(aten.log_sigmoid_forward(-x)[0])
    return aten.log_sigmoid_forward(x), lambda dx: (dx * slope, None)


@rule(
    aten.log_sigmoid_backward.default,
    family="elementwise",
    finite=evaluated(lambda g, z, buffer: g * (sigmoid_on_complex(-z) if z.is_complex() else torch.sigmoid(-z))),
)
def log_sigmoid_backward(g, x, buffer):
    slope = torch.sigmoid(-x)
    by_x = -g * slope * torch.sigmoid(x)
    return g * slope, lambda dg, dx, _: plus(times(dg, slope), times(dx, by_x))


@rule(aten.logit_backward.default, family="elementwise")
def logit_backward(g, x, eps=None):
    outside = (x < 0) | (x > 1) if eps is None else (x < eps) | (x > 1 - eps)
    f1 = torch.where(outside, torch.nan if eps is None else 0, 1 / (x * (1 - x)))
    by_x = g * (2 * x - 1) * f1 * f1
    return g * f1, lambda dg, dx: plus(times(dg, f1), times(dx, by_x))


# --- exponential linear units -----------------------------------------------------------------------------------


def _elu_on_complex(z, alpha=1, scale=1, input_scale=1):
    return torch.where(z.real > 0, scale * z, scale * alpha * torch.expm1(input_scale * torch.where(z.real > 0, 0, z)))


def elu_slope(x, y, alpha=1, scale=1, input_scale=1):
    return torch.where(x > 0, scale, input_scale * alpha * scale * torch.exp(input_scale * x.clamp(max=0)))


elementwise(aten.elu.default, elu_slope, _elu_on_complex)
elementwise(
    aten.celu.default,
    lambda x, y, alpha=1.0: elu_slope(x, y, alpha, 1, 1 / alpha),
    lambda z, alpha=1.0: _elu_on_complex(z, alpha, 1, 1 / alpha),
)


@rule(aten.elu_backward.default, family="elementwise")
def elu_backward(g, alpha, scale, input_scale, is_result, x):
    """``x`` is the result where the activation was taken in place."""
    y = x if is_result else aten.elu(x, alpha, scale, input_scale)
    f1 = elu_slope(x, y, alpha, scale, input_scale)
    if is_result:
        f1 = torch.where(x > 0, scale, input_scale * (y + alpha * scale))
    f2 = torch.where(x > 0, 0, torch.full_like(x, input_scale) if is_result else input_scale * f1)
    by_x = g * f2
    return g * f1, lambda dg, dx: plus(times(dg, f1), times(dx, by_x))


# --- piecewise linear: choose by the real part, carry the imaginary part along ----------------------------------


def _gate(forward, backward, *defaults):
    """Activation and backward operator g -> g f'(x) with f' locally constant: the kernel itself is the linear map."""

    @rule(forward, family="piecewise", finite=exact)
    def forward_rule(x, *parameters):
        chosen = parameters + defaults[len(parameters) :]
        return forward(x, *parameters), lambda dx: backward(dx, x, *chosen)

    @rule(backward, family="piecewise", finite=exact)
    def backward_rule(g, x, *parameters):
        return backward(g, x, *parameters), lambda dg, dx: None if dg is None else backward(dg, x, *parameters)


_gate(aten.hardtanh.default, aten.hardtanh_backward.default, -1, 1)
_gate(aten.hardsigmoid.default, aten.hardsigmoid_backward.default)
_gate(aten.hardshrink.default, aten.hardshrink_backward.default, 0.5)
_gate(aten.softshrink.default, aten.softshrink_backward.default, 0.5)


@rule(aten.threshold_backward.default, family="piecewise", finite=exact)
def threshold_backward(g, x, limit):
    op = aten.threshold_backward
    return op(g, x, limit), lambda dg, dx: None if dg is None else op(dg, x, limit)


@rule(aten.relu.default, family="piecewise", finite=exact)
def relu(x):
    y = torch.relu(x)
    return y, lambda dx: aten.threshold_backward(dx, y, 0)


@rule(aten.threshold.default, family="piecewise", finite=exact)
def threshold(x, limit, value):
    return aten.threshold(x, limit, value), lambda dx: aten.threshold_backward(dx, x, limit)


@rule(aten.leaky_relu.default, family="piecewise", finite=exact)
def leaky_relu(x, negative_slope=0.01):
    y = aten.leaky_relu(x, negative_slope)
    return y, lambda dx: aten.leaky_relu_backward(dx, x, negative_slope, False)


@rule(aten.leaky_relu_backward.default, family="piecewise", finite=exact)
def leaky_relu_backward(g, x, negative_slope, is_result):
    op = aten.leaky_relu_backward
    push = lambda dg, dx: None if dg is None else op(dg, x, negative_slope, is_result)
    return op(g, x, negative_slope, is_result), push


@rule(aten.rrelu_with_noise_backward.default, family="piecewise", finite=exact)
def rrelu_with_noise_backward(g, x, noise, *parameters):
    op = aten.rrelu_with_noise_backward
    push = lambda dg, dx, _: None if dg is None else op(dg, x, noise, *parameters)
    return op(g, x, noise, *parameters), push


@rule(aten.rrelu_with_noise.default, family="piecewise", finite=exact)
def rrelu_with_noise(x, noise, lower=0.125, upper=1 / 3, training=False, generator=None):
    """In training the kernel writes the slopes it has drawn over ``noise``."""
    y = aten.rrelu_with_noise(x, noise, lower, upper, training, generator)
    slope = noise if training else torch.where(x > 0, 1, torch.full_like(x, (lower + upper) / 2))
    return y, lambda dx, _: None if dx is None else dx * slope
