"""Margin losses over classes, z = margin - x[target] + x[other].

    multi-margin:             l = sum over others of max(0, z)^p w[target] / C
    multi-label margin:       l = sum over targets and others of max(0, z) / C: piecewise linear in x
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from imstep.complexstep.registry import defined_as, exact, rule

aten = torch.ops.aten

_NONE, _MEAN = 0, 1


@defined_as(aten.multi_margin_loss_backward.default)
def multi_margin_loss_backward(g, x, target, p, margin, weight=None, reduction=_MEAN):
    rows, targets = torch.atleast_2d(x), torch.atleast_1d(target).unsqueeze(1)
    count, classes = rows.shape
    z = margin - rows.gather(1, targets) + rows
    others = F.one_hot(targets.squeeze(1), classes) == 0
    active = others & (z > 0)
    slope = active.to(x.dtype) if p == 1 else torch.where(active, 2 * z, 0)
    if weight is not None:
        slope = slope * weight[targets]
    scale = g.reshape(-1, 1) / (classes * (count if reduction == _MEAN else 1))
    slope = slope * scale
    return torch.where(others, slope, -slope.sum(1, keepdim=True)).reshape(x.shape)


@rule(aten.multilabel_margin_loss_forward.default, family="loss", finite=exact)
def multilabel_margin_loss(x, target, reduction):
    y, is_target = aten.multilabel_margin_loss_forward(x, target, reduction)
    slope = aten.multilabel_margin_loss_backward(torch.ones_like(y), x, target, reduction, is_target)

    def push(dx, *_):
        dy = slope * dx
        return dy.sum(-1) if reduction == _NONE else dy.sum(), None

    return (y, is_target), push


@rule(aten.multilabel_margin_loss_backward.default, family="loss", finite=exact)
def multilabel_margin_loss_backward(g, x, target, reduction, is_target):
    def push(dg, dx, *_):
        if dg is None:
            return None
        return aten.multilabel_margin_loss_backward(dg, x, target, reduction, is_target)

    return aten.multilabel_margin_loss_backward(g, x, target, reduction, is_target), push
