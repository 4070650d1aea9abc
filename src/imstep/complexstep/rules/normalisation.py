"""Layer, group and RMS normalisation, and the softmaxes.

Normalisation over the dimensions D of a view of x, with m the mean and s the inverse deviation over D:

    n = (x - m) s,   y = w n + b              dn = s (dx - mean dx - n mean(n dx)),  dm = mean dx,  ds = -s^2 mean(n dx)
    u = g w,  gx = s (u - mean u - n mean(u n))
    gw = sum g n,    gb = sum g

RMS normalisation is the same without m. The backward pass is differentiated with m and s as arguments of their own.

    softmax:      dy = y (dx - sum y dx)               dgx = y (dg - sum y dg) + dy (g - sum y g) - y sum(dy g)
    log-softmax:  dy = dx - sum e^y dx                 dgx = dg - e^y sum dg - e^y dy sum g
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.complexstep.registry import rule
from imstep.complexstep.rules.blocks import addcmul_
from imstep.complexstep.rules.forms import plus

aten = torch.ops.aten


@dataclass(frozen=True)
class _Normalised:
    """n = (x - m) s on a view of x; ``over`` are the dimensions of the means, ``rows`` those that share a weight."""

    x: Tensor
    m: Tensor | None
    s: Tensor
    w: Tensor | None
    over: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def n(self):
        return self.x * self.s if self.m is None else (self.x - self.m) * self.s

    def mean(self, v):
        return v.mean(self.over, keepdim=True)

    def project(self, n, v):
        """s (v - mean v - n mean(n v)): the Jacobian of n, symmetric."""
        along = n * self.mean(n * v)
        return self.s * (v - along if self.m is None else v - self.mean(v) - along)

    def scaled(self, v, w):
        return v if w is None or v is None else v * w

    def forward(self, dx, dw, db):
        """dy, dm, ds."""
        n = self.n if dx is not None or dw is not None else None
        dy = dm = ds = None
        if dx is not None:
            along = self.mean(n * dx)
            dm = None if self.m is None else self.mean(dx)
            dn = (dx if dm is None else dx - dm).addcmul(n, along, value=-1) * self.s
            dy, ds = self.scaled(dn, self.w), -self.s * self.s * along
        if dw is not None:
            dy = n * dw if dy is None else torch.addcmul(dy, n, dw)
        return plus(dy, db), dm, ds

    def backward(self, g, dg, dx, dm, ds, dw):
        """dgx, dgw, dgb."""
        n = self.n
        u = self.scaled(g, self.w)
        du = plus(self.scaled(dg, self.w), None if dw is None else g * dw)
        dn = None
        if dx is not None or dm is not None:
            dn = (dx if dm is None else -dm if dx is None else dx - dm) * self.s
        if ds is not None:
            dn = plus(dn, n * (ds / self.s))
        un = self.mean(u * n)
        dgx = None if du is None else self.project(n, du)
        if dn is not None:
            dgx = plus(dgx, addcmul_(dn * un, n, self.mean(u * dn)) * -self.s)
        if ds is not None:
            dgx = plus(dgx, self.project(n, u) * (ds / self.s))
        dgw = plus(None if dg is None else dg * n, None if dn is None else g * dn)
        return dgx, self.over_rows(dgw), self.over_rows(dg)

    def over_rows(self, v):
        """The sum over what shares a weight; none does where the normalised dimensions are all there are."""
        return v if v is None or not self.rows else v.sum(self.rows, keepdim=True)


def _shape(v, like):
    return None if v is None else v.reshape(like.shape)


def _cast(v, dtype):
    return None if v is None else v.to(dtype)


# --- layer normalisation ------------------------------------------------------------------------------------


def _layer(x, shape, m, s, w):
    over = tuple(range(-len(shape), 0))
    rows = tuple(range(x.dim() - len(shape)))
    dtype = s.dtype
    return _Normalised(x.to(dtype), m, s, _cast(w, dtype), over, rows)


@rule(aten.native_layer_norm.default, family="normalisation")
def native_layer_norm(x, shape, w, b, eps):
    y, m, s = aten.native_layer_norm(x, shape, w, b, eps)
    if y.numel() == 0:
        return (y, m, s), None
    return (y, m, s), lambda dx, dw, db: _layer(x, shape, m, s, w).forward(dx, dw, db)


@rule(aten.native_layer_norm_backward.default, family="normalisation")
def native_layer_norm_backward(g, x, shape, m, s, w, b, mask):
    outputs = aten.native_layer_norm_backward(g, x, shape, m, s, w, b, mask)
    if x.numel() == 0:
        return outputs, None

    def push(dg, dx, dm, ds, dw, db):
        dgx, dgw, dgb = _layer(x, shape, m, s, w).backward(g, dg, dx, dm, ds, dw)
        flat = lambda v: None if v is None else v.reshape(shape)
        return dgx if mask[0] else None, flat(dgw) if mask[1] else None, flat(dgb) if mask[2] else None

    return outputs, push


@rule(aten._fused_rms_norm.default, family="normalisation")
def fused_rms_norm(x, shape, w, eps):
    y, s = aten._fused_rms_norm(x, shape, w, eps)

    def push(dx, dw):
        dy, _, ds = _layer(x, shape, None, s, w).forward(dx, dw, None)
        return dy, ds

    return (y, s), push


@rule(aten._fused_rms_norm_backward.default, family="normalisation")
def fused_rms_norm_backward(g, x, shape, s, w, mask):
    def push(dg, dx, ds, dw):
        dgx, dgw, _ = _layer(x, shape, None, s, w).backward(g, dg, dx, None, ds, dw)
        return dgx if mask[0] else None, dgw.reshape(shape) if mask[1] and dgw is not None else None

    return aten._fused_rms_norm_backward(g, x, shape, s, w, mask), push


# --- group normalisation ------------------------------------------------------------------------------------


def _grouped(x, m, s, w, N, C, HxW, group):
    split = (N, group, C // group, HxW)
    channels = (1, group, C // group, 1)
    view = lambda v: None if v is None else v.reshape(split).to(s.dtype)
    channel = lambda v: None if v is None else v.reshape(channels).to(s.dtype)
    statistic = lambda v: None if v is None else v.reshape(N, group, 1, 1)
    return _Normalised(view(x), statistic(m), statistic(s), channel(w), (2, 3), (0, 3)), view, channel, statistic


@rule(aten.native_group_norm.default, family="normalisation")
def native_group_norm(x, w, b, N, C, HxW, group, eps):
    y, m, s = aten.native_group_norm(x, w, b, N, C, HxW, group, eps)

    def push(dx, dw, db):
        normalised, view, channel, _ = _grouped(x, m, s, w, N, C, HxW, group)
        dy, dm, ds = normalised.forward(view(dx), channel(dw), channel(db))
        dy = dy.expand(N, group, C // group, HxW).reshape(x.shape)
        return dy, _shape(dm, m), _shape(ds, s)

    return (y, m, s), push


@rule(aten.native_group_norm_backward.default, family="normalisation")
def native_group_norm_backward(g, x, m, s, w, N, C, HxW, group, mask):
    def push(dg, dx, dm, ds, dw):
        normalised, view, channel, statistic = _grouped(x, m, s, w, N, C, HxW, group)
        parts = normalised.backward(view(g), view(dg), view(dx), statistic(dm), statistic(ds), channel(dw))
        shapes = (x.shape, (C,), (C,))
        return tuple(
            p.reshape(shape) if wanted and p is not None else None
            for p, shape, wanted in zip(parts, shapes, mask, strict=True)
        )

    return aten.native_group_norm_backward(g, x, m, s, w, N, C, HxW, group, mask), push


# --- softmax ------------------------------------------------------------------------------------------------


@rule(aten._softmax.default, family="normalisation")
def softmax(x, dim, half_to_float):
    y = aten._softmax(x, dim, half_to_float)
    return y, lambda dx: aten._softmax_backward_data(dx.to(y.dtype), y, dim, y.dtype)


@rule(aten._safe_softmax.default, family="normalisation")
def safe_softmax(x, dim, dtype=None):
    y = aten._safe_softmax(x, dim, dtype)
    return y, lambda dx: aten._softmax_backward_data(dx.to(y.dtype), y, dim, y.dtype)


@rule(aten._softmax_backward_data.default, family="normalisation")
def softmax_backward(g, y, dim, dtype):
    def push(dg, dy):
        total = None if dg is None else aten._softmax_backward_data(dg, y, dim, y.dtype)
        if dy is not None:
            centred = g - (y * g).sum(dim, keepdim=True)
            other = torch.addcmul(dy * centred, y, (dy * g).sum(dim, keepdim=True), value=-1)
            total = plus(total, other)
        return total.to(dtype)

    return aten._softmax_backward_data(g, y, dim, dtype), push


@rule(aten._log_softmax.default, family="normalisation")
def log_softmax(x, dim, half_to_float):
    y = aten._log_softmax(x, dim, half_to_float)

    def push(dx):
        dx = dx.to(y.dtype)
        return dx - (y.exp() * dx).sum(dim, keepdim=True)

    return y, push


@rule(aten._log_softmax_backward_data.default, family="normalisation")
def log_softmax_backward(g, y, dim, dtype):
    def push(dg, dy):
        total = None if dg is None else aten._log_softmax_backward_data(dg, y, dim, y.dtype)
        if dy is not None:
            other = y.exp() * g.sum(dim, keepdim=True) * dy
            total = -other if total is None else total - other
        return total.to(dtype)

    return aten._log_softmax_backward_data(g, y, dim, dtype), push
