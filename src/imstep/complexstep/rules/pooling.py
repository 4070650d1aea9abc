"""Pooling, unpooling and resampling: linear once the real parts have chosen the maxima.

    max:       y = x[k], k = argmax      dy = dx[k];   the backward pass scatters dg to the same k
    average:   y = A x                   dy = A dx;    the backward pass is A^T
    resample:  as average
"""

from __future__ import annotations

import torch

from imstep.complexstep.errors import REPORT, UnsupportedOperatorError
from imstep.complexstep.registry import Rule, exact, linear, register

aten = torch.ops.aten


def _adjoint(func, args, kwargs):
    """The transpose of a linear map, in its first argument; the second gives its shape, the others choices."""
    rest = args[1:]

    def push(dg, dx, *others):
        if any(d is not None for d in others):
            raise UnsupportedOperatorError(func, "a perturbed tensor stands where a constant is expected.", REPORT)
        return None if dg is None else func(dg, *rest, **kwargs)

    return func(*args, **kwargs), push


def adjoint(*operators):
    """Backward operators that are linear in the gradient and take only shapes from the perturbed input."""
    register(operators, Rule("linear", _adjoint, exact(_adjoint)))


def _choosing(dims):
    """Pooling over the last ``dims`` dimensions that also returns the flat positions of the maxima."""

    def linearize(func, args, kwargs):
        y, at = func(*args, **kwargs)

        def push(dx, *_):
            return dx.flatten(-dims).gather(-1, at.flatten(-dims)).view(at.shape), None

        return (y, at), push

    return Rule("piecewise", linearize, exact(linearize))


register([aten.max_pool2d_with_indices.default, aten.adaptive_max_pool2d.default], _choosing(2))
register([aten.max_pool3d_with_indices.default, aten.adaptive_max_pool3d.default], _choosing(3))
register([aten.fractional_max_pool2d.default], _choosing(2))
register([aten.fractional_max_pool3d.default], _choosing(3))
adjoint(aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default)
adjoint(aten.adaptive_max_pool2d_backward.default, aten.adaptive_max_pool3d_backward.default)
adjoint(aten.fractional_max_pool2d_backward.default, aten.fractional_max_pool3d_backward.default)
linear(aten.max_unpool2d.default, aten.max_unpool3d.default)

linear(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
linear(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
adjoint(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default)
adjoint(aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default)

_MODES = (
    *("nearest1d", "nearest2d", "nearest3d", "_nearest_exact1d", "_nearest_exact2d", "_nearest_exact3d"),
    *("linear1d", "bilinear2d", "trilinear3d", "bicubic2d", "_bilinear2d_aa", "_bicubic2d_aa"),
)
for _mode in _MODES:
    _name = f"_upsample{_mode}" if _mode.startswith("_") else f"upsample_{_mode}"
    linear(getattr(aten, _name).default, getattr(aten, f"{_name}_backward").default)
for _name in ("reflection_pad", "replication_pad"):
    for _dims in (1, 2, 3):
        linear(getattr(aten, f"{_name}{_dims}d").default)
        adjoint(getattr(aten, f"{_name}{_dims}d_backward").default)
linear(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default)
