"""Operators that return some of the entries and where they stood: the imaginary part is gathered from there."""

from __future__ import annotations

import torch

from imstep.complexstep.registry import exact, rule

aten = torch.ops.aten


def _taken(dx, index, dim, keepdim):
    """The entries of ``dx`` at ``index``, an index tensor of the reduced shape."""
    if dx.dim() == 0:
        return dx
    if keepdim:
        return dx.gather(dim, index)
    return dx.gather(dim, index.unsqueeze(dim)).squeeze(dim)


def _one_along(op):
    """(values, indices) of one entry along a dimension: max, min, median, mode, kthvalue."""

    def select(x, *args, **kwargs):
        outputs = op(x, *args, **kwargs)
        position = 1 if op is aten.kthvalue.default else 0
        dim = args[position] if len(args) > position else kwargs.get("dim", -1)
        keepdim = args[position + 1] if len(args) > position + 1 else kwargs.get("keepdim", False)
        index = outputs[1]
        return outputs, lambda dx: (_taken(dx, index, dim, keepdim), None)

    return select


for _op in (
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
    aten.kthvalue.default,
):
    rule(_op, family="piecewise", finite=exact)(_one_along(_op))


def _median_push(dx, index):
    return dx.reshape(-1).gather(0, index.reshape(1)).reshape(())


for _op, _along in ((aten.median.default, torch.median), (aten.nanmedian.default, torch.nanmedian)):

    def _rule(x, op=_op, along=_along):
        if x.numel() == 0:
            return op(x), None
        index = along(x.reshape(-1), 0)[1]
        return op(x), lambda dx: _median_push(dx, index)

    rule(_op, family="piecewise", finite=exact)(_rule)


def _ordered(op):
    """(values, indices) along a dimension: sort, topk, cummax, cummin."""

    def order(x, *args, **kwargs):
        outputs = op(x, *args, **kwargs)
        position = {aten.topk.default: 1, aten.sort.stable: 99}.get(op, 0)
        dim = args[position] if len(args) > position else kwargs.get("dim", -1)
        index = outputs[1]
        return outputs, lambda dx: (dx if dx.dim() == 0 else dx.gather(dim, index), None)

    return order


for _op in (aten.topk.default, aten.sort.default, aten.sort.stable, aten.cummax.default, aten.cummin.default):
    rule(_op, family="piecewise", finite=exact)(_ordered(_op))
