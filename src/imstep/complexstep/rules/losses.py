"""Losses and their backward operators.

Those that depend on a difference, l(e) with e = x - t, are reduced with factor k = 1/n (mean) or 1:

    dy = k sum l'(e) de                 forward; entry by entry without reduction
    gx = k g l'(e)                      dgx = k dg l'(e) + k g l''(e) de

The negative log-likelihood picks entries of x: it is linear, and so is its backward pass in g. The others are
computed through PyTorch's decompositions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from imstep.complexstep.errors import REPORT, UnsupportedOperatorError
from imstep.complexstep.registry import exact, rule
from imstep.complexstep.rules.forms import plus

aten = torch.ops.aten

_NONE, _MEAN, _SUM = 0, 1, 2


def _reduce(v, reduction):
    if reduction == _NONE:
        return v
    return v.mean() if reduction == _MEAN else v.sum()


def _difference(dx, dt):
    if dt is None:
        return dx
    return -dt if dx is None else dx - dt


def _pair(loss, backward, second, *default):
    """Rules of a loss of x - t and of its backward operator; ``second(x, t, *parameters)`` is l''."""

    def forward(x, t, reduction=_MEAN, *parameters):
        parameters = parameters or default
        y = loss(x, t, reduction, *parameters)
        slope = backward(torch.ones_like(y), x, t, reduction, *parameters)  # holds the factor k

        def push(dx, dt):
            dy = slope * _difference(dx, dt)
            return dy if reduction == _NONE else dy.sum()

        return y, push

    def backwards(g, x, t, reduction, *parameters):
        scale = 1 / max(x.numel(), 1) if reduction == _MEAN else 1.0
        curvature = second(x, t, *parameters)

        def push(dg, dx, dt):
            total = None if dg is None else backward(dg, x, t, reduction, *parameters)
            de = _difference(dx, dt)
            if de is None or curvature is None:
                return total
            return plus(total, de * (g * scale * curvature))

        return backward(g, x, t, reduction, *parameters), push

    rule(loss.default, family="loss")(forward)
    rule(backward.default, family="loss")(backwards)


_pair(aten.mse_loss, aten.mse_loss_backward, lambda x, t: 2.0)
_pair(
    aten.smooth_l1_loss,
    aten.smooth_l1_loss_backward,
    lambda x, t, beta: ((x - t).abs() < beta).to(x.dtype) / beta if beta > 0 else None,
    1.0,
)
_pair(aten.huber_loss, aten.huber_loss_backward, lambda x, t, delta: ((x - t).abs() <= delta).to(x.dtype), 1.0)


# --- negative log-likelihood --------------------------------------------------------------------------------


def _picking(op):
    def forward(x, target, weight, reduction, ignore_index):
        def push(dx, _, dweight):
            _refuse_weight(op, dweight)
            return op(dx, target, weight, reduction, ignore_index)[0], None

        return op(x, target, weight, reduction, ignore_index), push

    return forward


def _scattering(op):
    def backward(g, x, target, weight, reduction, ignore_index, total_weight):
        def push(dg, dx, _, dweight, dtotal):
            _refuse_weight(op, dweight)
            return None if dg is None else op(dg, x, target, weight, reduction, ignore_index, total_weight)

        return op(g, x, target, weight, reduction, ignore_index, total_weight), push

    return backward


def _refuse_weight(op, dweight):
    if dweight is not None:
        raise UnsupportedOperatorError(op, "its class weights are perturbed; autograd has no derivative there.", REPORT)


rule(aten.nll_loss_forward.default, family="loss", finite=exact)(_picking(aten.nll_loss_forward))
rule(aten.nll_loss2d_forward.default, family="loss", finite=exact)(_picking(aten.nll_loss2d_forward))
rule(aten.nll_loss_backward.default, family="loss", finite=exact)(_scattering(aten.nll_loss_backward))
rule(aten.nll_loss2d_backward.default, family="loss", finite=exact)(_scattering(aten.nll_loss2d_backward))


# --- binary cross entropy -----------------------------------------------------------------------------------


@rule(aten.binary_cross_entropy_with_logits.default, family="loss")
def binary_cross_entropy_with_logits(x, t, weight=None, pos_weight=None, reduction=_MEAN):
    """l = (1 - t) x + (1 + (p - 1) t) softplus(-x), times the weight."""
    y = aten.binary_cross_entropy_with_logits(x, t, weight, pos_weight, reduction)

    def push(dx, dt, dweight, dpos):
        weighted = lambda v: v if weight is None else v * weight
        positive = 1.0 if pos_weight is None else 1 + (pos_weight - 1) * t
        total = None
        if dx is not None:
            total = weighted(dx * (1 - t - positive * torch.sigmoid(-x)))
        if dt is not None:
            softplus = 0.0 if pos_weight is None else (pos_weight - 1) * F.softplus(-x)
            total = plus(total, weighted(dt * (softplus - x)))
        if dpos is not None:
            total = plus(total, weighted(t * dpos * F.softplus(-x)))
        if dweight is not None:
            plain = aten.binary_cross_entropy_with_logits(x, t, None, pos_weight, _NONE)
            total = plus(total, dweight * plain)
        return _reduce(total, reduction)

    return y, push


_CLAMP = -100.0  # PyTorch keeps the logarithms above this


@rule(aten.binary_cross_entropy.default, family="loss")
def binary_cross_entropy(x, t, weight=None, reduction=_MEAN):
    """l = -t log x - (1 - t) log(1 - x), times the weight."""
    y = aten.binary_cross_entropy(x, t, weight, reduction)

    def push(dx, dt, dweight):
        weighted = lambda v: v if weight is None else v * weight
        total = None
        if dx is not None:
            total = dx * aten.binary_cross_entropy_backward(torch.ones_like(x), x, t, weight, _NONE)
        if dt is not None:
            logit = torch.log1p(-x).clamp(min=_CLAMP) - torch.log(x).clamp(min=_CLAMP)
            total = plus(total, weighted(dt * logit))
        if dweight is not None:
            total = plus(total, dweight * aten.binary_cross_entropy(x, t, None, _NONE))
        return _reduce(total, reduction)

    return y, push


# --- soft margin --------------------------------------------------------------------------------------------


@rule(aten.soft_margin_loss.default, family="loss")
def soft_margin_loss(x, t, reduction=_MEAN):
    """l = log(1 + exp v), v = -tx."""
    slope = torch.sigmoid(-t * x)
    return aten.soft_margin_loss(x, t, reduction), lambda dx, dt: _reduce(slope * _of_product(x, t, dx, dt), reduction)


@rule(aten.soft_margin_loss_backward.default, family="loss")
def soft_margin_loss_backward(g, x, t, reduction=_MEAN):
    """gx = -k g t s, s = sigmoid v."""
    k = 1 / max(x.numel(), 1) if reduction == _MEAN else 1.0
    s, rest = torch.sigmoid(-t * x), torch.sigmoid(t * x)

    def push(dg, dx, dt):
        total = None if dg is None else -k * dg * t * s
        if dx is not None or dt is not None:
            total = plus(total, -k * g * t * s * rest * _of_product(x, t, dx, dt))
        return total if dt is None else plus(total, -k * g * dt * s)

    return aten.soft_margin_loss_backward(g, x, t, reduction), push


def _of_product(x, t, dx, dt):
    """dv of v = -tx."""
    return -plus(None if dx is None else t * dx, None if dt is None else x * dt)
