"""Distances between all pairs of rows, by definition, with the derivative 0 where two rows coincide.

    d = (sum |a - b|^p)^(1/p)         d d / d a = sign(a - b) (|a - b| / d)^(p-1)
"""

from __future__ import annotations

import math

import torch

from imstep.complexstep.registry import defined_as, rule
from imstep.complexstep.rules.forms import evaluated, total

aten = torch.ops.aten


def _power(v, exponent):
    return v if exponent == 1 else v.pow(exponent)


def _norm(e, p):
    """The p-norm of e over its last dimension."""
    if p == 0:
        return (e != 0).to(e.dtype).sum(-1)
    if p == 1:
        return e.abs().sum(-1)
    if math.isinf(p):
        return e.abs().amax(-1)
    powers = e * e if p == 2 else torch.where(e == 0, 1, e).abs().pow(p) * (e != 0)
    sums = powers.sum(-1)
    zero = sums <= 0  # a finite step leaves -h²
    safe = torch.where(zero, 1, sums)
    return torch.where(zero, 0, safe.sqrt() if p == 2 else safe.pow(1 / p))


def _norm_gradient(e, p, d):
    """The gradient of ``d``, the p-norm of ``e``, one vector per norm."""
    d = d.unsqueeze(-1)
    if e.shape[-1] == 1 and p != 0:
        p = 2  # the absolute value, whatever p
    if p == 0:
        return torch.zeros_like(e)
    if p == 1:
        return e.sign()
    if math.isinf(p):
        return e.sign() * (e.abs() == d)
    unit = (e / d).masked_fill(d == 0, 0)  # as autograd guards the gradient of a norm
    if p != 2:
        nowhere = e == 0
        unit = e.sign() * torch.where(nowhere, 1, unit).abs().pow(p - 1) * ~nowhere
    return unit


@defined_as(aten._cdist_forward.default)
def cdist(x, y, p, compute_mode=None):
    return _norm(x.unsqueeze(-2) - y.unsqueeze(-3), p)


def _euclidean_on_complex(x, y):
    dtype = torch.result_type(x, y)
    x, y = x.to(dtype), y.to(dtype)
    squares = (x * x).sum(-1, keepdim=True) + (y * y).sum(-1).unsqueeze(-2) - 2 * (x @ y.mT)
    return torch.sqrt(torch.where(squares.real <= 0, 0, squares))


@rule(aten._euclidean_dist.default, family="reduction", finite=evaluated(_euclidean_on_complex))
def euclidean_dist(x, y):
    """By products of matrices: d d' = (x - y)·(x' - y'), multiplied out."""
    d = aten._euclidean_dist(x, y)
    inverse = torch.where(d == 0, 0, 1 / d)

    def push(dx, dy):
        by_x = None if dx is None else (x * dx).sum(-1, keepdim=True) - dx @ y.mT
        by_y = None if dy is None else (y * dy).sum(-1).unsqueeze(-2) - x @ dy.mT
        return total(by_x, by_y) * inverse

    return d, push


@defined_as(aten._cdist_backward.default)
def cdist_backward(g, x, y, p, d):
    return (_norm_gradient(x.unsqueeze(-2) - y.unsqueeze(-3), p, d) * g.unsqueeze(-1)).sum(-2)


def _pairs(x):
    return torch.triu_indices(len(x), len(x), 1, device=x.device)


@defined_as(aten._pdist_forward.default)
def pdist(x, p=2.0):
    i, j = _pairs(x)
    return _norm(x[i] - x[j], p)


@defined_as(aten._pdist_backward.default)
def pdist_backward(g, x, p, d):
    i, j = _pairs(x)
    each = _norm_gradient(x[i] - x[j], p, d) * g.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, i, each).index_add(0, j, -each)
