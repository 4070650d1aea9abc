"""The LSTM cell and its backward pass; symbols as in :mod:`imstep.complexstep.recurrent`.

    da = S dgates,   dc' = df c + f dc + di g + i dg,   dh = do t + o (1 - t²) dc'
    m = (u g, u c, u i, gh t):   dggates = dm S + m S' da,   S' = (1 - 2i, 1 - 2f, -2g, 1 - 2o)
"""

from __future__ import annotations

import torch

from imstep.complexstep.recurrent import cell, cell_backward, slope
from imstep.complexstep.registry import defined_as, rule
from imstep.complexstep.rules.forms import plus, times, total

_cell, _backward = torch.ops.imstep.lstm_cell.default, torch.ops.imstep.lstm_cell_backward.default
defined_as(_cell)(cell)
defined_as(_backward)(cell_backward)


@rule(_cell, family="recurrence")
def lstm_cell(gates, c):
    h, after, a = cell(gates, c)
    i, f, g, o = a.chunk(4, 1)
    t = torch.tanh(after)
    s, back = slope(a), o * (1 - t * t)

    def push(dgates, dc):
        da, dh = None, None
        d_after = times(dc, f)
        if dgates is not None:
            da = dgates * s
            di, df, dg, do = da.chunk(4, 1)
            d_after = plus(d_after, di * g + df * c + dg * i)
            dh = do * t
        return plus(dh, times(d_after, back)), d_after, da

    return (h, after, a), push


@rule(_backward, family="recurrence")
def lstm_cell_backward(gh, gc, a, c, after):
    outputs = cell_backward(gh, gc, a, c, after)
    i, f, g, o = a.chunk(4, 1)
    t = torch.tanh(after)
    rest = 1 - t * t
    back = o * rest
    u = gc + gh * back
    s = slope(a)
    turn = torch.cat([u * g, u * c, u * i, gh * t], 1) * torch.cat([1 - 2 * i, 1 - 2 * f, -2 * g, 1 - 2 * o], 1)
    direct, bend = gh * rest, -2 * gh * back * t

    def push(dgh, dgc, da, dc, d_after):
        di, df, dg, do = (None,) * 4 if da is None else da.chunk(4, 1)
        du = total(dgc, times(dgh, back), times(do, direct), times(d_after, bend))
        dt = times(d_after, rest)
        parts = [
            plus(times(du, g), times(dg, u)),
            plus(times(du, c), times(dc, u)),
            plus(times(du, i), times(di, u)),
            plus(times(dgh, t), times(dt, gh)),
        ]
        dm = torch.cat([torch.zeros_like(u) if p is None else p for p in parts], 1)
        return plus(dm * s, times(da, turn)), plus(times(du, f), times(df, u))

    return outputs, push
