"""Functions entry by entry, by formulas of f, f' and f''."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imstep.pde.forward_mode import by_forward_mode
from imstep.pde.jet import Jet, chain, rule, value_of

Slopes = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _elementwise(*names: str) -> Callable[[Slopes], Slopes]:
    """Registers a function that gives f, f' and f'' at x."""

    def register(slopes: Slopes) -> Slopes:
        def apply(input: Jet, *args: Any, **kwargs: Any) -> Jet:
            return chain(input, slopes(input.value, *args, **kwargs))

        rule(*names, fresh=True)(apply)
        return slopes

    return register


@_elementwise("tanh")
def _tanh(x: Tensor) -> Any:
    y = torch.tanh(x)
    slope = 1 - y.square()
    return y, slope, -2 * y * slope


@_elementwise("sin")
def _sin(x: Tensor) -> Any:
    y = torch.sin(x)
    return y, torch.cos(x), -y


@_elementwise("cos")
def _cos(x: Tensor) -> Any:
    y = torch.cos(x)
    return y, -torch.sin(x), -y


@_elementwise("exp")
def _exp(x: Tensor) -> Any:
    y = torch.exp(x)
    return y, y, y


@_elementwise("log")
def _log(x: Tensor) -> Any:
    slope = 1 / x
    return torch.log(x), slope, -slope.square()


@_elementwise("sqrt")
def _sqrt(x: Tensor) -> Any:
    y = torch.sqrt(x)
    slope = 0.5 / y
    return y, slope, -0.5 * slope / x


@_elementwise("reciprocal")
def _reciprocal(x: Tensor) -> Any:
    y = 1 / x
    slope = -y.square()
    return y, slope, -2 * slope * y


@_elementwise("square")
def _square(x: Tensor) -> Any:
    return x.square(), 2 * x, torch.full_like(x, 2)


@_elementwise("sigmoid")
def _sigmoid(x: Tensor) -> Any:
    y = torch.sigmoid(x)
    slope = y * (1 - y)
    return y, slope, slope * (1 - 2 * y)


@_elementwise("silu")
def _silu(x: Tensor) -> Any:
    s = torch.sigmoid(x)
    slope = s * (1 - s)
    return x * s, s + x * slope, slope * (2 + x * (1 - 2 * s))


@_elementwise("softplus")
def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    scaled = beta * x
    slope = torch.where(scaled > threshold, 1.0, torch.sigmoid(scaled))
    return F.softplus(x, beta, threshold), slope, beta * slope * (1 - slope)


@_elementwise("erf")
def _erf(x: Tensor) -> Any:
    slope = 2 / math.sqrt(math.pi) * torch.exp(-x.square())
    return torch.erf(x), slope, -2 * x * slope


@_elementwise("relu")
def _relu(x: Tensor) -> Any:
    y = torch.relu(x)
    return y, (x > 0).to(x.dtype), None


@_elementwise("gelu")
def _gelu(x: Tensor, approximate: str = "none") -> Any:
    if approximate == "none":
        share = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        return x * share, share + x * density, density * (2 - x.square())
    root = math.sqrt(2 / math.pi)
    t, inner = torch.tanh(root * (x + 0.044715 * x**3)), root * (1 + 0.134145 * x.square())
    slope = (1 - t.square()) * inner
    bend = (1 - t.square()) * (root * 0.26829 * x - 2 * t * inner.square())
    return 0.5 * x * (1 + t), 0.5 * (1 + t + x * slope), slope + 0.5 * x * bend


@_elementwise("rsqrt")
def _rsqrt(x: Tensor) -> Any:
    y = torch.rsqrt(x)
    slope = -0.5 * y / x
    return y, slope, -1.5 * slope / x


@rule("copysign")
def _copysign(input: Any, other: Any) -> Any:
    """|x| with the sign of another, in which it does not vary."""
    if not isinstance(input, Jet):
        return torch.copysign(input, value_of(other))
    sign = torch.copysign(torch.ones_like(input.value), value_of(other))
    return input.abs() * sign


@rule("glu")
def _glu(input: Jet, dim: int = -1) -> Any:
    kept, gate = input.chunk(2, dim)
    return kept * gate.sigmoid()


@rule("pow", "__pow__", fresh=True)
def _pow(input: Any, exponent: Any) -> Any:
    if not isinstance(input, Jet) or isinstance(exponent, Tensor):
        if _is_complex(input) and isinstance(exponent, Jet) and not exponent.is_complex():
            # PyTorch 2.13's forward derivative by a real exponent is the real part of what it should be.
            exponent = exponent * complex(1)
        return by_forward_mode(torch.pow, (input, exponent), {})
    x, p = input.value, exponent
    bend = None if p in (0, 1) else p * (p - 1) * x ** (p - 2)
    return chain(input, (x**p, p * x ** (p - 1) if p else torch.zeros_like(x), bend))


def _is_complex(t: Any) -> bool:
    return t.is_complex() if isinstance(t, Tensor) else isinstance(t, complex)


@rule("__rpow__", fresh=True)
def _rpow(input: Any, other: Any) -> Any:
    return _pow(other, input)
