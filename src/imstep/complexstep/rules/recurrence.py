"""A layer of an LSTM and its backward pass; symbols as in :mod:`imstep.complexstep.recurrent`.

    d = dp + W dh + dW h                                    change of the gates
    dc' = f dc + (g, c, i) S d,    dh' = t S d + o (1 - t²) dc',    da = S d

    du = dgc' + o (1 - t²) dgh' + gh' (1 - t²) do - 2 gh' o (1 - t²) t dc'
    m = (u g, u c, u i, gh' t):   dggates = dm S + m S' da,   dgc = f du + u df,   dgh = dghs + Wᵀ dggates + dWᵀ ggates

with S' = (1 - 2i, 1 - 2f, -2g, 1 - 2o). Only what a step takes from its neighbour is left in the loop over time; the
rest is computed for all steps at once.
"""

from __future__ import annotations

import torch

from imstep.complexstep.recurrent import backward_steps, before, layer, layer_backward, slope
from imstep.complexstep.registry import defined_as, rule
from imstep.complexstep.rules.blocks import addcmul_, in_place, product
from imstep.complexstep.rules.forms import add_, plus, times, total, zeros_of

aten = torch.ops.aten
_layer, _backward = torch.ops.imstep.lstm_layer.default, torch.ops.imstep.lstm_layer_backward.default
defined_as(_layer)(layer)
defined_as(_backward)(layer_backward)


def _by_rows(a, b):
    """a b for each step, as one product."""
    return product(a.flatten(0, 1), b).unflatten(0, a.shape[:2])


def _room(parts, like):
    """Zeros for all steps, with the batches of a part that is there."""
    return next(d for d in parts if d is not None).new_zeros(like.shape)


def _filled(all_steps, steps):
    """What was computed step by step in the memory of ``all_steps``, or beside it where a block found no room."""
    return all_steps if in_place(all_steps, *steps) else torch.stack(steps)


@rule(_layer, family="recurrence")
def lstm_layer(p, h, c, w):
    hs, cs, a = layer(p, h, c, w)
    i, f, g, o = a.chunk(4, -1)
    t, s = torch.tanh(cs), slope(a)
    h_before, recurrent, hidden = before(h, hs), w.t(), h.shape[-1]
    to_c = torch.cat([g, before(c, cs), i], -1) * s[..., : 3 * hidden]
    to_h, back = t * s[..., 3 * hidden :], o * (1 - t * t)

    def push(dp, dh, dc, dw):
        if dw is None:
            d_gates = _room((dh, dc), p) if dp is None else dp.clone()
        else:
            d_gates = _by_rows(h_before, dw.t())
            d_gates = d_gates if dp is None else add_(d_gates, dp)
        gates, ds, dcs = [], [], []
        for at in range(len(p)):
            d = d_gates[at] if dh is None else product(dh, recurrent, onto=d_gates[at])
            d_after = (d[:, : 3 * hidden] * to_c[at]).unflatten(1, (3, hidden)).sum(1)
            dc = d_after if dc is None else addcmul_(d_after, dc, f[at])
            dh = addcmul_(d[:, 3 * hidden :] * to_h[at], dc, back[at])
            gates.append(d)
            ds.append(dh)
            dcs.append(dc)
        return torch.stack(ds), torch.stack(dcs), _filled(d_gates, gates).mul_(s)

    return (hs, cs, a), push


@rule(_backward, family="recurrence")
def lstm_layer_backward(gh, gc, a, cs, c, w):
    made = backward_steps(gh, gc, a, cs, c, w)
    gates, gh, u, t, back, to_gates = made.gates, made.gh, made.u, made.t, made.back, made.to_gates
    i, f, g, o = a.chunk(4, -1)
    rest = 1 - t * t
    direct, bend = gh * rest, -2 * gh * back * t
    turn = torch.cat([u * g * (1 - 2 * i), u * before(c, cs) * (1 - 2 * f), -2 * u * i * g, gh * t * (1 - 2 * o)], -1)

    def bent(da, dcs, dc):
        """The change of the gates' gradients that does not pass through h and c."""
        if da is None and dcs is None and dc is None:
            return None
        zero = zeros_of(u)
        di, _, dg, _ = (zero,) * 4 if da is None else da.chunk(4, -1)
        started = before(zeros_of(c) if dc is None else dc, zero if dcs is None else dcs)
        dt = zero if dcs is None else dcs * rest
        # The kernels multiply by S(a) without keeping it.
        to_i, to_f = aten.sigmoid_backward(u * dg, i), aten.sigmoid_backward(u * started, f)
        to_g, to_o = aten.tanh_backward(u * di, g), aten.sigmoid_backward(gh * dt, o)
        by_factor = torch.cat([to_i, to_f, to_g, to_o], -1)
        return by_factor if da is None else addcmul_(by_factor, da, turn)

    def push(dgh, dgc, da, dcs, dc, dw):
        through_w = None
        if dw is not None and len(cs) > 1:
            through_w = torch.cat([_by_rows(gates[1:], dw), torch.zeros_like(gates[:1] @ dw)])
        to_h = plus(through_w, dgh)
        to_h = zeros_of(u) if to_h is None else to_h
        d_output, d_forget = (None, None) if da is None else (da.chunk(4, -1)[3], da.chunk(4, -1)[1])
        to_c = total(times(d_output, direct), times(dcs, bend), dgc)
        changes, forgotten = bent(da, dcs, dc), times(d_forget, u)
        changes = _room((dgh, dgc, dw), gates) if changes is None else changes
        at_step = lambda v, at: None if v is None else v[at]
        steps, carried = [], None
        for at in reversed(range(len(cs))):
            reached = torch.addmm(to_h[at], steps[-1], w) if steps else to_h[at]
            du = plus(reached * back[at], plus(at_step(to_c, at), carried))
            steps.append(addcmul_(changes[at], torch.cat([du, du, du, reached], 1), to_gates[at]))
            carried = plus(du * f[at], at_step(forgotten, at))
        return _filled(changes, steps[::-1]), carried

    return (gates, made.first_c), push
