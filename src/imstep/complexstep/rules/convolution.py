"""Convolution, transposed or not, of any dimension and grouping: bilinear in input and weight.

    y = x * w + b                  dy = dx * w + x * dw + db
    gx = B1(g, w)                  dgx = B1(dg, w) + B1(g, dw)
    gw = B2(g, x)                  dgw = B2(dg, x) + B2(g, dx)
    gb = sum g                     dgb = sum dg

Only the products asked for by the output mask and by the parts that are present are computed, the second group
being added onto the first in place.
"""

from __future__ import annotations

import torch

from imstep.complexstep.registry import Rule, linear, register, rule
from imstep.complexstep.rules.forms import add_

aten = torch.ops.aten

linear(aten.im2col.default, aten.col2im.default)


def _onto(first, second):
    """first + second, in the memory of the first; either may be absent."""
    if first is None or second is None:
        return second if first is None else first
    return add_(first, second)


# --- convolution --------------------------------------------------------------------------------------------


def _bias_on_channels(db, dimensions):
    return db.reshape(-1, *[1] * (dimensions - 2))


def _convolution(func, args, kwargs):
    x, w = args[:2]
    geometry = args[3:]

    def push(dx, dw, db):
        y = None if dx is None else func(dx, w, db, *geometry)
        if dw is not None:
            y = _onto(y, func(x, dw, db if dx is None else None, *geometry))
        return _bias_on_channels(db, x.dim()) if y is None else y

    return func(*args, **kwargs), push


def _convolution_finite(func, args, kwargs, ims, h):
    y, push = _convolution(func, args, kwargs)
    dx, dw, _ = ims
    if dx is not None and dw is not None:
        y = y - h * h * func(dx, dw, None, *args[3:])
    return y, push(*ims)


register([aten.convolution.default], Rule("multilinear", _convolution, _convolution_finite))


# --- its backward pass --------------------------------------------------------------------------------------


def _products(dg, dx, dw, args):
    """B(dg; x, w) + B(g; dx, dw), each with the products that are wanted and not zero."""
    g, x, w, bias_sizes, *geometry, mask = args
    first = second = (None, None, None)
    if dg is not None:
        first = aten.convolution_backward(dg, x, w, bias_sizes, *geometry, mask)
    wanted = [mask[0] and dw is not None, mask[1] and dx is not None, False]
    if any(wanted):
        operands = (x if dx is None else dx, w if dw is None else dw)
        second = aten.convolution_backward(g, *operands, None, *geometry, wanted)
    return tuple(_onto(a, b) for a, b in zip(first, second, strict=True))


def _convolution_backward(func, args, kwargs):
    return func(*args, **kwargs), lambda dg, dx, dw: _products(dg, dx, dw, args)


def _convolution_backward_finite(func, args, kwargs, ims, h):
    dg, dx, dw = ims
    outputs = func(*args, **kwargs)
    mask = args[-1]
    wanted = [mask[0] and dw is not None, mask[1] and dx is not None, False]
    if dg is not None and any(wanted):
        operands = (args[1] if dx is None else dx, args[2] if dw is None else dw)
        squares = func(dg, *operands, None, *args[4:-1], wanted)
        outputs = tuple(y if s is None else y - h * h * s for y, s in zip(outputs, squares, strict=True))
    return outputs, _products(dg, dx, dw, args)


register([aten.convolution_backward.default], Rule("multilinear", _convolution_backward, _convolution_backward_finite))


# --- convolution over (time, batch, channels) -----------------------------------------------------------------------


@rule(aten.conv_tbc.default, family="multilinear")
def conv_tbc(x, w, b, pad=0):
    def push(dx, dw, db):
        zero = torch.zeros_like(b)
        y = None if dx is None else aten.conv_tbc(dx, w, zero if db is None else db, pad)
        if dw is not None:
            y = _onto(y, aten.conv_tbc(x, dw, db if dx is None and db is not None else zero, pad))
        return db if y is None else y

    return aten.conv_tbc(x, w, b, pad), push


@rule(aten.conv_tbc_backward.default, family="multilinear")
def conv_tbc_backward(g, x, w, b, pad):
    def push(dg, dx, dw, db):
        first = (None, None, None) if dg is None else aten.conv_tbc_backward(dg, x, w, b, pad)
        gx = None if dw is None else aten.conv_tbc_backward(g, x, dw, b, pad)[0]
        gw = None if dx is None else aten.conv_tbc_backward(g, dx, w, b, pad)[1]
        return _onto(first[0], gx), _onto(first[1], gw), first[2]

    return aten.conv_tbc_backward(g, x, w, b, pad), push
