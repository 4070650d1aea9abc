"""Layer, group and RMS normalisation, and the softmaxes.

Normalisation over the dimensions D of a view of x, with m the mean and s the inverse deviation over D:

    n = (x - m) s,   y = w n + b              dn = s (dx - mean dx - n mean(n dx)),  dm = mean dx,  ds = -s^2 mean(n dx)
    u = g w,  gx = s (u - mean u - n mean(u n))         dgx = J (du + u ds / s) - s (dn mean(u n) + n mean(u dn))
    gw = sum g n,    gb = sum g                         J v = s (v - mean v - n mean(n v))

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
from imstep.complexstep.rules.forms import add_

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
        return self.x * self.s if self.m is None else (self.x - self.m).mul_(self.s)

    def mean(self, v):
        return v.mean(self.over, keepdim=True)

    def project(self, n, v):
        """s (v - mean v - n mean(n v)), in memory of its own: the Jacobian of n, symmetric."""
        if self.m is None:
            return torch.addcmul(v, n, self.mean(n * v), value=-1).mul_(self.s)
        # PyTorch's kernel goes once over memory. Given n, which has the mean 0 and the deviation 1, it loses no digits.
        shape, zero, one = [n.shape[d] for d in self.over], torch.zeros_like(self.s), torch.ones_like(self.s)
        mask = [True, False, False]
        v = v.to(n.dtype)
        return aten.native_layer_norm_backward(v, n, shape, zero, one, None, None, mask)[0].mul_(self.s)

    def scaled(self, v, w):
        return v if w is None or v is None else v * w

    def forward(self, dx, dw, db):
        """dy, dm, ds."""
        n = self.n if dx is not None or dw is not None else None
        dy = dm = ds = None
        if dx is not None:
            dm = None if self.m is None else self.mean(dx)
            ds = -self.s * self.s * self.mean(n * dx)
            dy = self.project(n, dx)
            dy = dy if self.w is None else dy.mul_(self.w)
        if dw is not None:
            dy = n * dw if dy is None else addcmul_(dy, n, dw)
        return db if dy is None else dy if db is None else add_(dy, db), dm, ds

    def along(self, g):
        """mean(u n), which no direction changes."""
        return self.mean(self.scaled(g, self.w) * self.n)

    def backward(self, g, un, dg, dx, dm, ds, dw):
        """dgx, dgw, dgb; ``un`` is mean(u n)."""
        n, s, dn, du = self.n, self.s, None, dg
        if dx is not None or dm is not None:
            dn = (dx if dm is None else (-dm).expand(n.shape) if dx is None else dx - dm) * s
        if ds is not None:
            dn = n * (ds / s) if dn is None else addcmul_(dn, n, ds / s)
            du = g * (ds / s) if du is None else torch.addcmul(du, g, ds / s)
        du = self.scaled(du, self.w)
        if dw is not None:
            du = g * dw if du is None else torch.addcmul(du, g, dw)
        dgx = None if du is None else self.project(n, du)
        dgw = None if dn is None else g * dn
        if dn is not None:
            udn = self.mean(self.scaled(dgw, self.w))
            dgx = dn * (-s * un) if dgx is None else addcmul_(dgx, dn, -s * un)
            dgx = addcmul_(dgx, n, -s * udn)
        if dg is not None:
            dgw = dg * n if dgw is None else addcmul_(dgw, dg, n)
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

    un = _layer(x, shape, m, s, w).along(g)

    def push(dg, dx, dm, ds, dw, db):
        dgx, dgw, dgb = _layer(x, shape, m, s, w).backward(g, un, dg, dx, dm, ds, dw)
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
    un = _layer(x, shape, None, s, w).along(g)

    def push(dg, dx, ds, dw):
        dgx, dgw, _ = _layer(x, shape, None, s, w).backward(g, un, dg, dx, None, ds, dw)
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
    normalised, view, *_ = _grouped(x, m, s, w, N, C, HxW, group)
    un = normalised.along(view(g))

    def push(dg, dx, dm, ds, dw):
        normalised, view, channel, statistic = _grouped(x, m, s, w, N, C, HxW, group)
        parts = normalised.backward(view(g), un, view(dg), view(dx), statistic(dm), statistic(ds), channel(dw))
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
    yg = (y * g).sum(dim, keepdim=True)

    def push(dg, dy):
        total = None if dg is None else aten._softmax_backward_data(dg, y, dim, y.dtype)
        if dy is not None:
            total = dy * (g - yg) if total is None else addcmul_(total, dy, g - yg)
            total = addcmul_(total, y, -(dy * g).sum(dim, keepdim=True))
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
