"""Layers of an LSTM and of plain units, and their backward passes.

Of plain units, with symbols as in :mod:`imstep.complexstep.rnn_layer`,

    dh' = φ' (dp + dW h + W dh),    dga = φ' (dgh' + dWᵀ ga + Wᵀ dga) + dφ' r,    dφ' = -2 h' dh' for tanh, 0 for relu

and of an LSTM, with symbols as in :mod:`imstep.complexstep.lstm_layer`.

With S the slopes of the activations and m = q S, q = (g, c, i, t):

    d = dp + W dh + dW h                                    change of the gates
    dc' = f dc + (m_i, m_f, m_g) d,    dh' = m_o d_o + b dc',    da = S d

    du = dgc' + b dgh' + gh' (1 - t²) do - 2 gh' b t dc'
    dggates = (du, du, du, dgh') m + (u, u, u, gh') (S dq + q S' da)
    dgc = f du + u df,    dgh = dgh' + Wᵀ dggates + dWᵀ ggates

with dq = (dg, dc, di, (1 - t²) dc') and S' = (1 - 2i, 1 - 2f, -2g, 1 - 2o). Only what a step takes from its neighbour
is left in the loop over time; the rest is computed for all steps at once. A block of directions stands behind the time,
so that a step finds its own in one piece.
"""

from __future__ import annotations

import torch

from imstep.complexstep import rnn_layer
from imstep.complexstep.gemm import multiply
from imstep.complexstep.layers_of_steps import before, steps_of
from imstep.complexstep.lstm_layer import (
    by_factor,
    gates_of,
    layer,
    layer_backward,
    run,
    run_backward,
    slope_of_output,
    slopes_,
)
from imstep.complexstep.registry import defined_as, rule
from imstep.complexstep.rules.blocks import in_front

aten = torch.ops.aten
_layer, _backward = torch.ops.imstep.lstm_layer.default, torch.ops.imstep.lstm_layer_backward.default
defined_as(_layer)(layer)
defined_as(_backward)(layer_backward)
_plain, _plain_backward = torch.ops.imstep.rnn_layer.default, torch.ops.imstep.rnn_layer_backward.default
defined_as(_plain)(rnn_layer.layer)
defined_as(_plain_backward)(rnn_layer.layer_backward)


def behind_time(change, ims, like):
    """A copy of ``change`` (block, time, ...) with the block behind the time; zeros, shaped as all steps, for None."""
    if change is not None:
        return change.movedim(0, 1).clone(memory_format=torch.contiguous_format)
    k = next(len(d) for d in ims if d is not None)
    return like.new_zeros(like.shape[0], k, *like.shape[1:])


def by_rows(a, b):
    """a (..., m) times b (m, n)."""
    return multiply(a.reshape(-1, a.shape[-1]), b).unflatten(0, a.shape[:-1])


def product(a, bs):
    """a (time, batch, m) times each of bs (block, m, n), (time, block, batch, n)."""
    each = [by_rows(a, b) for b in bs]
    return each[0].unsqueeze(1) if len(each) == 1 else torch.stack(each, 1)


def write(into, change, factor):
    """Write change times factor over ``into``, nothing counting as zero."""
    if change is None:
        into.zero_()
    else:
        torch.mul(change, factor.unsqueeze(1), out=into)


# --- forward --------------------------------------------------------------------------------------------------------


@rule(_layer, family="recurrence")
def lstm_layer(p, h, c, w):
    hs, cs, a, m, t = run(p, h, c, w)
    recurrent, hidden, b = w.t(), h.shape[-1], slope_of_output(a, t)

    @in_front
    def push(dp, dh, dc, dw):
        d = behind_time(dp, (dh, dc), p) if dw is None else product(before(h, hs), dw.mT)
        if dp is not None and dw is not None:
            d.add_(dp.movedim(0, 1))
        dhs, dcs = d.new_empty(*d.shape[:-1], hidden), d.new_empty(*d.shape[:-1], hidden)
        parts = d, *gates_of(d), *gates_of(m), gates_of(a)[1], b, dcs, dhs
        for gates, di, df, dg, do, mi, mf, mg, mo, f, back, after_c, after_h in steps_of(*parts):
            if dh is not None:
                gates.add_(by_rows(dh, recurrent))
            torch.mul(di, mi, out=after_c).addcmul_(df, mf).addcmul_(dg, mg)
            dc = after_c if dc is None else after_c.addcmul_(dc, f)
            dh = torch.mul(do, mo, out=after_h).addcmul_(dc, back)
        slopes_(d, gates_of(d), a.unsqueeze(1).expand(d.shape))
        return dhs.movedim(1, 0), dcs.movedim(1, 0), d.movedim(1, 0), None, None

    return (hs, cs, a, m, t), push


# --- backward -------------------------------------------------------------------------------------------------------


@rule(_backward, family="recurrence")
def lstm_layer_backward(gh, gc, a, cs, c, w, m, t):
    b, (i, f, g, o) = slope_of_output(a, t), gates_of(a)
    gates, first, gh, u = run_backward(gh, gc, a, w, m, b)
    by_output = aten.tanh_backward(gh, t)
    by_c = gh * b * t * -2
    turn = torch.cat([u * g * (1 - 2 * i), u * before(c, cs) * (1 - 2 * f), u * i * g * -2, gh * t * (1 - 2 * o)], -1)

    @in_front
    def push(dgh, dgc, da, dcs, dc, dw, *_):
        ims = dgh, dgc, da, dcs, dc, dw
        to_h, to_u = behind_time(dgh, ims, u), behind_time(dgc, ims, u)
        if dw is not None:
            to_h[:-1].add_(product(gates[1:], dw))
        di, df, dg, do = (None,) * 4 if da is None else gates_of(da.movedim(0, 1))
        if dcs is not None:
            dcs = dcs.movedim(0, 1)
            to_u.addcmul_(dcs, by_c.unsqueeze(1))
        if da is not None:
            to_u.addcmul_(do, by_output.unsqueeze(1))
        changes = a.new_empty(len(a), to_u.shape[1], *a.shape[1:])
        forgotten = torch.empty_like(to_u)
        of_i, of_f, of_g, of_o = gates_of(changes)
        write(forgotten, df, u)
        write(of_i, dg, u)
        write(of_g, di, u)
        write(of_o, dcs, by_output)
        write(of_f[1:], None if dcs is None else dcs[:-1], u[1:])
        write(of_f[:1], None if dc is None else dc.unsqueeze(0), u[:1])
        slopes_(changes, gates_of(changes), a.unsqueeze(1).expand(changes.shape))
        if da is not None:
            changes.addcmul_(da.movedim(0, 1), turn.unsqueeze(1))
        return changes.movedim(1, 0), _go_back(changes, to_h, to_u, forgotten, w, f, m, b)

    return (gates, first), push


def _go_back(changes, to_h, to_u, forgotten, w, f, m, b):
    """Complete the changes of the gates' gradients, step by step; returns that of the first c's."""
    after = carried = None
    parts = changes, *by_factor(changes), *by_factor(m), to_h, to_u, forgotten, f, b
    for gates, by_u, by_h, m_u, m_h, reached, du, forgot, kept, back in reversed(list(steps_of(*parts))):
        if after is not None:
            reached.add_(by_rows(after, w))
            du.add_(carried)
        du.addcmul_(reached, back)
        by_u.addcmul_(du.unsqueeze(-2), m_u)
        by_h.addcmul_(reached, m_h)
        after, carried = gates, forgot.addcmul_(du, kept)
    return carried


# --- plain units ----------------------------------------------------------------------------------------------------


@rule(_plain, family="recurrence")
def plain_layer(p, h, w, relu):
    hs = rnn_layer.run(p, h, w, relu)
    recurrent = w.t()

    @in_front
    def push(dp, dh, dw):
        d = behind_time(dp, (dh, dw), p) if dw is None else product(before(h, hs), dw.mT)
        if dp is not None and dw is not None:
            d.add_(dp.movedim(0, 1))
        for change, h_ in steps_of(d, hs):
            if dh is not None:
                change.add_(by_rows(dh, recurrent))
            dh = rnn_layer.by_slope_(change, h_.expand_as(change), relu)
        return (d.movedim(1, 0),)

    return hs, lambda *ims: push(*ims)[0]


@rule(_plain_backward, family="recurrence")
def plain_layer_backward(gh, hs, w, relu):
    ga = rnn_layer.go_back_(gh.clone(memory_format=torch.contiguous_format), hs, w, relu)
    bend = None
    if not relu:
        reached = gh.clone(memory_format=torch.contiguous_format)
        reached[:-1].flatten(0, 1).add_(by_rows(ga[1:], w).flatten(0, 1))
        bend = reached.mul_(hs).mul_(-2)

    @in_front
    def push(dgh, dhs, dw):
        d = behind_time(dgh, (dhs, dw), gh)
        if dw is not None:
            d[:-1].add_(product(ga[1:], dw))
        more = None if dhs is None or bend is None else behind_time(dhs, (), hs).mul_(bend.unsqueeze(1))
        return (rnn_layer.go_back_(d, hs, w, relu, more).movedim(1, 0),)

    return ga, lambda *ims: push(*ims)[0]
