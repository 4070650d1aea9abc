"""Reductions over segments of a dimension, written with gather and scatter."""

from __future__ import annotations

import torch

from imstep.complexstep.registry import defined_as

aten = torch.ops.aten

_MODES = {"sum": "sum", "mean": "sum", "prod": "prod", "max": "amax", "min": "amin"}
_NEUTRAL = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "max": -torch.inf, "min": torch.inf}


def _segments(data, lengths, offsets, axis):
    """The segment of each entry, in the shape of ``data``, one more for entries of none; the lengths of segments."""
    ends = offsets.narrow(axis, 1, offsets.size(axis) - 1) if lengths is None else lengths.cumsum(axis)
    places = torch.arange(data.size(axis), device=data.device, dtype=ends.dtype).expand(*ends.shape[:-1], -1)
    segment = torch.searchsorted(ends.contiguous(), places.contiguous(), right=True)
    if lengths is None:  # unsafe ones may begin late
        segment = segment.masked_fill(places < offsets.narrow(axis, 0, 1), ends.size(axis))
        lengths = offsets.diff(dim=axis)
    trailing = (1,) * (data.dim() - axis - 1)
    return segment.reshape(*segment.shape, *trailing).expand_as(data), lengths.reshape(*lengths.shape, *trailing)


def _with_rest(t, axis):
    """Values of segments, and zero for the entries of none."""
    return torch.cat([t, t.new_zeros(*t.shape[:axis], 1, *t.shape[axis + 1 :])], axis)


@defined_as(aten.segment_reduce.default)
def segment_reduce(data, reduce, *, lengths=None, indices=None, offsets=None, axis=0, unsafe=False, initial=None):
    segment, lengths = _segments(data, lengths, offsets, axis)
    count = lengths.size(axis)
    shape = (*data.shape[:axis], count + 1, *data.shape[axis + 1 :])
    start = data.new_full(shape, _NEUTRAL[reduce] if initial is None else initial)
    total = torch.scatter_reduce(start, axis, segment, data, _MODES[reduce]).narrow(axis, 0, count)
    if reduce != "mean":
        return total
    empty = torch.nan if initial is None else initial
    return torch.where(lengths == 0, empty, total / lengths.clamp_min(1))


@defined_as(aten._segment_reduce_backward.default)
def segment_reduce_backward(g, output, data, reduce, *, lengths=None, offsets=None, axis=0, initial=None):
    segment, lengths = _segments(data, lengths, offsets, axis)
    own = lambda t: _with_rest(t, axis).gather(axis, segment)
    if reduce == "sum":
        return own(g)
    if reduce == "mean":
        return own(g / lengths.clamp_min(1))
    if reduce == "prod":
        product = torch.where(data == 0, _others(data, segment, axis, output, initial), own(output) / data)
        return own(g) * product
    attained = (data == own(output)).to(data.dtype)
    count = torch.zeros_like(_with_rest(output, axis)).scatter_add(axis, segment, attained)
    return attained * own(g) / count.clamp_min(1).gather(axis, segment)


def _others(data, segment, axis, output, initial):
    """The product of the others at a zero: what the rest of its segment multiplies to."""
    ones = torch.full_like(_with_rest(output, axis), 1.0 if initial is None else initial)
    zeros = torch.zeros_like(ones).scatter_add(axis, segment, (data == 0).to(data.dtype)).gather(axis, segment)
    rest = torch.scatter_reduce(ones, axis, segment, torch.where(data == 0, 1, data), "prod").gather(axis, segment)
    return torch.where(zeros == 1, rest, 0)
