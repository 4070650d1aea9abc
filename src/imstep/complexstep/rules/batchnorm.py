"""Batch normalisation, each channel over all other dimensions.

    c = x - m,  n = c s,  y = w n + b          m mean, s inverse deviation; in evaluation mode both are constants
    dn = s (dx - mean dx - n mean(n dx))       dm = mean dx,  ds = -s^2 mean(n dx)

The Jacobian of n is symmetric, so PyTorch's fused backward kernel, applied to dx, gives w dn, and beside it the sums
dm and ds need. Backward, with g the incoming gradient, s1 = mean g, s2 = mean(g n):

    gx = w s (g - s1 - n s2),   gw = sum g n,   gb = sum g

Its imaginary part is the same kernel applied to dg plus P (g - s1) + Q c + R dc, dc = dx - dm, with one
number per channel in P = dw s + w ds, Q = -P s s2 - w s (s t + ds s2), R = -w s^2 s2, and t = mean(g dn).
Running statistics are overwritten once, by the forward kernel, with real numbers; their imaginary part is dropped,
as autograd does.
"""

from __future__ import annotations

import torch

from imstep.complexstep.errors import REPORT, UnsupportedOperatorError
from imstep.complexstep.registry import rule
from imstep.complexstep.rules.blocks import addcmul_
from imstep.complexstep.rules.forms import add_, evaluated, plus

aten = torch.ops.aten

_ALL = [True, True, True]


def _kernel(g, x, w, m, s, mask):
    """The fused backward kernel at given batch statistics."""
    return _fused(g, x, w, None, None, m, s, True, 0.0, mask)


def _fused(g, x, w, mean, var, m, s, training, eps, mask):
    """The fused backward kernel, which takes a single dtype under vmap."""
    op = aten.native_batch_norm_backward
    if x.dtype == m.dtype or torch._C._functorch.maybe_current_level() is None:
        return op(g, x, w, mean, var, m, s, training, eps, mask)
    gx, gw, gb = op(g.to(m.dtype), x.to(m.dtype), w, mean, var, m, s, training, eps, mask)
    return gx.to(x.dtype) if mask[0] else gx, gw, gb


def _per_channel(v, x):
    return (v if v.is_complex() else v.to(x.dtype)).view(-1, *[1] * (x.dim() - 2))


def _refuse_perturbed(op, *statistics):
    if any(s is not None for s in statistics):
        raise UnsupportedOperatorError(op, "a running statistic is perturbed; autograd has no derivative.", REPORT)


def _affine(dy, dw, db, x, m, s):
    """dy + dw n + db."""
    if dw is not None:
        shift = -m * s * dw if db is None else db - m * s * dw
        slope = _per_channel(s * dw, x)
        scaled = x * slope if dy is None else addcmul_(dy, x, slope)
        return add_(scaled, _per_channel(shift, x))
    if db is None:
        return dy
    return _per_channel(db, x) if dy is None else add_(dy, _per_channel(db, x))


def _forward_training(x, w, m, s):
    """The map (dx, dw, db) -> (dy, dm, ds)."""
    count = x.numel() // x.shape[1]

    def push(dx, dw, db):
        dy = dm = ds = None
        if dx is not None:
            unit = torch.ones_like(m) if w is None else w
            dy, total_n, total = _kernel(dx, x, unit, m, s, _ALL)
            dm, ds = total / count, s * s * total_n / -count
        return _affine(dy, dw, db, x, m, s), dm, ds

    return push


def _forward_evaluation(op, x, w, mean, var, eps):
    s = torch.rsqrt(var + eps)
    slope = _per_channel(s if w is None else s * w, x)

    def push(dx, dw, db, dmean, dvar):
        _refuse_perturbed(op, dmean, dvar)
        dy = None if dx is None else dx * slope
        return _affine(dy, dw, db, x, mean, s)

    return push


def _complex_batch_norm(x, w, b, mean, var, training, momentum, eps):
    """The formula, for complex x."""
    if training:
        dims = [0, *range(2, x.dim())]
        m = x.mean(dims)
        c = x - _per_channel(m, x)
        v = (c * c).mean(dims)
        count = x.numel() // x.shape[1]
        if mean is not None:
            mean.lerp_(_real(m).to(mean.dtype), momentum)
            var.lerp_(_real(v).to(var.dtype) * (count / max(count - 1, 1)), momentum)
        s = 1 / torch.sqrt(v + eps)
        saved = (m, s)
    else:
        c, s = x - _per_channel(mean, x), torch.rsqrt(var + eps)
        saved = (mean.new_empty(0), mean.new_empty(0))
    y = c * _per_channel(s if w is None else s * w, x)
    return (y if b is None else y + _per_channel(b, x), *saved)


def _complex_batch_norm_backward(g, x, w, mean, var, m, s, training, eps, mask):
    """The formula, for complex numbers."""
    if not training:
        m, s = mean, torch.rsqrt(var + eps)
    dims = [0, *range(2, x.dim())]
    n = (x - _per_channel(m, x)) * _per_channel(s, x)
    gw, gb = (g * n).sum(dims), g.sum(dims)
    slope = _per_channel(s if w is None else s * w, n)
    count = x.numel() // x.shape[1]
    r = g - _per_channel(gb / count, n) - n * _per_channel(gw / count, n) if training else g
    return r * slope, gw, gb


def _real(v):
    return v.real if v.is_complex() else v


@rule(aten.native_batch_norm.default, family="normalisation", finite=evaluated(_complex_batch_norm))
def native_batch_norm(x, w, b, mean, var, training, momentum, eps):
    y, m, s = aten.native_batch_norm(x, w, b, mean, var, training, momentum, eps)
    if training:
        push = _forward_training(x, w, m, s)
        return (y, m, s), lambda dx, dw, db, *_: push(dx, dw, db)
    evaluate = _forward_evaluation(aten.native_batch_norm, x, w, mean, var, eps)
    return (y, m, s), lambda *ims: (evaluate(*ims), None, None)


@rule(aten._native_batch_norm_legit.no_stats, family="normalisation")
def native_batch_norm_no_stats(x, w, b, training, momentum, eps):
    y, m, s = aten._native_batch_norm_legit(x, w, b, training, momentum, eps)
    return (y, m, s), _forward_training(x, w, m, s)


@rule(aten._native_batch_norm_legit.default, family="normalisation", finite=evaluated(_complex_batch_norm))
def native_batch_norm_legit(x, w, b, mean, var, training, momentum, eps):
    return native_batch_norm(x, w, b, mean, var, training, momentum, eps)


@rule(aten._native_batch_norm_legit_no_training.default, family="normalisation")
def native_batch_norm_no_training(x, w, b, mean, var, momentum, eps):
    return native_batch_norm(x, w, b, mean, var, False, momentum, eps)


def _with_reserve(op):
    """The operators that also return a buffer for their own backward pass."""

    def forward(x, w, b, mean, var, *rest):
        outputs = op(x, w, b, mean, var, *rest)
        training = op is not aten._batch_norm_no_update and (len(rest) == 2 or rest[0])
        if training:
            push = _forward_training(x, w, outputs[1], outputs[2])
            return outputs, lambda dx, dw, db, *_: (*push(dx, dw, db), None)
        evaluate = _forward_evaluation(op, x, w, mean, var, rest[-1])
        return outputs, lambda *ims: (evaluate(*ims), None, None, None)

    return forward


for _op in (aten.cudnn_batch_norm, aten._batch_norm_with_update, aten._batch_norm_no_update):
    rule(_op.default, family="normalisation")(_with_reserve(_op))


@rule(aten.miopen_batch_norm.default, family="normalisation")
def miopen_batch_norm(x, w, b, mean, var, training, momentum, eps):
    outputs = aten.miopen_batch_norm(x, w, b, mean, var, training, momentum, eps)
    if training:
        push = _forward_training(x, w, outputs[1], outputs[2])
        return outputs, lambda dx, dw, db, *_: push(dx, dw, db)
    evaluate = _forward_evaluation(aten.miopen_batch_norm, x, w, mean, var, eps)
    return outputs, lambda *ims: (evaluate(*ims), None, None)


# --- backward -----------------------------------------------------------------------------------------------


def _masked(values, mask):
    return tuple(v if wanted else None for v, wanted in zip(values, mask, strict=True))


def _coefficients(g, w, m, s, s1, s2, dx, dw, dm, ds):
    """P, Q, R and sum(g dn) per channel; see the head of this file."""
    unit = torch.ones_like(m) if w is None else w
    p = plus(None if dw is None else dw * s, None if ds is None else unit * ds)
    t = None
    if dx is not None:  # the kernel's second output at statistics dm and 1: sum g (dx - dm)
        centre = torch.zeros_like(m) if dm is None else dm
        total = _kernel(g, dx, unit, centre, torch.ones_like(m), [False, True, False])[1]
        t = s * total / (g.numel() // g.shape[1])
    elif dm is not None:
        t = -s * dm * s1
    if ds is not None:
        t = plus(t, ds * s2 / s)
    q = None if p is None else -p * s * s2
    if t is not None:
        q = plus(q, -unit * s * s * t)
    if ds is not None:
        q = plus(q, -unit * s * ds * s2)
    return p, q, -unit * s * s * s2, t


def _backward_training(g, x, w, m, s, mask):
    """Outputs, and the map (dg, dx, dw, dm, ds) -> their imaginary parts."""
    count = x.numel() // x.shape[1]
    outputs = _kernel(g, x, w, m, s, _ALL)
    s1, s2 = (outputs[2] / count).to(m.dtype), (outputs[1] / count).to(m.dtype)

    def push(dg, dx, dw, dm, ds):
        first = (None, None, None) if dg is None else _kernel(dg, x, w, m, s, mask)
        p, q, r, t = _coefficients(g, w, m, s, s1, s2, dx, dw, dm, ds)
        dgx = first[0]
        if mask[0]:
            shift = None
            for v, slope, centre in ((g, p, s1), (x, q, m), (dx, r, dm)):
                if v is not None and slope is not None:
                    slope_x = _per_channel(slope, x)
                    dgx = v * slope_x if dgx is None else addcmul_(dgx, v, slope_x)
                if slope is not None and centre is not None:
                    shift = plus(shift, -slope * centre)
            if shift is not None:
                dgx = _per_channel(shift, x) if dgx is None else add_(dgx, _per_channel(shift, x))
        dgw = plus(first[1], None if t is None else count * t) if mask[1] else None
        return dgx, dgw, first[2]

    return _masked(outputs, mask), push


def _backward_evaluation(op, g, x, w, mean, var, eps, mask):
    s = torch.rsqrt(var + eps)
    kernel = lambda dg, wanted: _fused(
        dg, x, w, mean, var, mean, s, False, eps, wanted  # the statistics again: vmap insists on them
    )
    dims = [0, *range(2, x.dim())]

    def push(dg, dx, dw, dmean, dvar):
        _refuse_perturbed(op, dmean, dvar)
        dgx, dgw, dgb = (None, None, None) if dg is None else kernel(dg, mask)
        if mask[0] and dw is not None:
            dgx = plus(dgx, g * _per_channel(s * dw, x))
        if mask[1] and dx is not None:
            dgw = plus(dgw, s * (g * dx).sum(dims).to(s.dtype))
        return dgx, dgw, dgb

    return kernel(g, mask), push


@rule(aten.native_batch_norm_backward.default, family="normalisation", finite=evaluated(_complex_batch_norm_backward))
def native_batch_norm_backward(g, x, w, mean, var, m, s, training, eps, mask):
    if training:
        outputs, push = _backward_training(g, x, w, m, s, mask)
        return outputs, lambda dg, dx, dw, dmean, dvar, dm, ds: push(dg, dx, dw, dm, ds)
    op = aten.native_batch_norm_backward
    outputs, push = _backward_evaluation(op, g, x, w, mean, var, eps, mask)
    return outputs, lambda dg, dx, dw, dmean, dvar, dm, ds: push(dg, dx, dw, dmean, dvar)


@rule(aten.batch_norm_backward.default, family="normalisation")
def batch_norm_backward(g, x, w, mean, var, m, s, update, eps, mask, reserve):
    outputs, push = native_batch_norm_backward(g, x, w, mean, var, m, s, update, eps, mask)
    return outputs, lambda *ims: push(*ims[:7])


@rule(aten.cudnn_batch_norm_backward.default, family="normalisation")
def cudnn_batch_norm_backward(x, g, w, mean, var, m, s, eps, reserve):
    outputs, push = _backward_training(g, x, w, m, s, _ALL)
    return outputs, lambda dx, dg, dw, dmean, dvar, dm, ds, _: push(dg, dx, dw, dm, ds)


@rule(aten.miopen_batch_norm_backward.default, family="normalisation")
def miopen_batch_norm_backward(x, g, w, mean, var, m, s, eps):
    outputs, push = _backward_training(g, x, w, m, s, _ALL)
    return outputs, lambda dx, dg, dw, dmean, dvar, dm, ds: push(dg, dx, dw, dm, ds)
