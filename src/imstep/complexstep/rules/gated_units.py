"""Layers of a GRU, and their backward passes.

With symbols as in :mod:`imstep.complexstep.gru_layer`, and m = (k_r, k_z, s) for the changes of p as k for those of o,

    do = dW h + W dh + db,    dh' = z dh + Σ (m dp + k do)                                  a sum over the three gates
    da_r = r (1 - r) (dp_r + do_r),  da_z = z (1 - z) (dp_z + do_z),  da_n = (1 - n²) (dp_n + r do_n + q da_r)

    de = dgh' + (dz e + z de + dWᵀ go + Wᵀ dgo) of the step after,    dgo = k de + e dk,    dgp_n = s de + e ds
    ds = -dz (1 - n²) - 2 n dn (1 - z),    dk_n = s dr + r ds
    dk_r = q r (1 - r) ds + s r (1 - r) dq + s q (1 - 2r) dr,    dk_z = z (1 - z) (dh - dn) + (h - n) (1 - 2z) dz

As for an LSTM, only what a step takes from its neighbour is left in the loop over time.
"""

from __future__ import annotations

import torch

from imstep.complexstep.gemm import multiply_onto
from imstep.complexstep.gru_layer import (
    gates_of,
    go_back_,
    layer,
    layer_backward,
    run,
    run_backward,
    slope_of_new,
)
from imstep.complexstep.layers_of_steps import before, steps_of
from imstep.complexstep.registry import defined_as, rule
from imstep.complexstep.rules.blocks import in_front
from imstep.complexstep.rules.recurrence import behind_time, product, write

aten = torch.ops.aten
_layer, _backward = torch.ops.imstep.gru_layer.default, torch.ops.imstep.gru_layer_backward.default
defined_as(_layer)(layer)
defined_as(_backward)(layer_backward)


@rule(_layer, family="recurrence")
def gru_layer(p, h, w, b):
    hs, a, q, k = run(p, h, w, b)
    (r, z, _), s, recurrent, hidden = gates_of(a), slope_of_new(a), w.t(), h.shape[-1]

    @in_front
    def push(dp, dh, dw, db):
        ims = dp, dh, dw, db
        d = behind_time(None, ims, p) if dw is None else product(before(h, hs), dw.mT)
        if db is not None:
            d.add_(db.unsqueeze(1))
        dhs = behind_time(None, ims, hs)
        if dp is not None:
            dp = dp.movedim(0, 1)
            for change, factor in zip(gates_of(dp), (*gates_of(k)[:2], s), strict=True):
                dhs.addcmul_(change, factor.unsqueeze(1))
        parts = d, *gates_of(d), *gates_of(k), z, dhs
        for own, dr, dz, dn, kr, kz, kn, kept, after in steps_of(*parts):
            if dh is not None:
                multiply_onto(own.view(-1, own.shape[-1]), dh.reshape(-1, dh.shape[-1]), recurrent)
                after.addcmul_(dh, kept)
            dh = after.addcmul_(dr, kr).addcmul_(dz, kz).addcmul_(dn, kn)
        (of_r, _, of_n), (both, _) = gates_of(d), d.split((2 * hidden, hidden), -1)
        dq = of_n.clone()
        of_n.mul_(r.unsqueeze(1))
        if dp is not None:
            d.add_(dp)
        of_both, of_new = a.unsqueeze(1).expand(d.shape).split((2 * hidden, hidden), -1)
        aten.sigmoid_backward.grad_input(both, of_both, grad_input=both)
        of_n.addcmul_(of_r, q.unsqueeze(1))
        aten.tanh_backward.grad_input(of_n, of_new, grad_input=of_n)
        return dhs.movedim(1, 0), d.movedim(1, 0), dq.movedim(1, 0), None

    return (hs, a, q, k), push


@rule(_backward, family="recurrence")
def gru_layer_backward(gh, a, q, hs, h, w, k):
    gp, own, first, e = run_backward(gh, a, w, k)
    (r, z, n), s, of_n = gates_of(a), slope_of_new(a), gates_of(gp)[2]
    # What changes of the arguments make of e k and e s.
    s_by_z, s_by_n = aten.tanh_backward(e, n).neg_(), e * (1 - z) * n * -2
    r_by_s, r_by_q, r_by_r = aten.sigmoid_backward(q, r), aten.sigmoid_backward(of_n, r), of_n * q * (1 - 2 * r)
    z_by_h, z_by_z = aten.sigmoid_backward(e, z), e * (before(h, hs) - n) * (1 - 2 * z)

    @in_front
    def push(dgh, da, dq, dhs, dh, dw, *_):
        ims = dgh, da, dq, dhs, dh, dw
        changes, de = behind_time(None, ims, own), behind_time(None, ims, e.new_empty(len(e) + 1, *e.shape[1:]))
        if dgh is not None:
            de[1:].copy_(dgh.movedim(0, 1))
        if dw is not None:
            de[:-1].add_(product(own, dw))
        of_r, of_z, of_own = gates_of(changes)
        if dhs is not None or dh is not None:
            write(of_z[1:], None if dhs is None else dhs.movedim(0, 1)[:-1], z_by_h[1:])
            write(of_z[:1], None if dh is None else dh.unsqueeze(0), z_by_h[:1])
        if dq is not None:
            torch.mul(dq.movedim(0, 1), r_by_q.unsqueeze(1), out=of_r)
        ds = None
        if da is not None:
            dr, dz, dn = gates_of(da.movedim(0, 1))
            de[:-1].addcmul_(dz, e.unsqueeze(1))
            ds = (dz * s_by_z.unsqueeze(1)).addcmul_(dn, s_by_n.unsqueeze(1))
            of_r.addcmul_(ds, r_by_s.unsqueeze(1)).addcmul_(dr, r_by_r.unsqueeze(1))
            of_z.addcmul_(dn, z_by_h.unsqueeze(1), value=-1).addcmul_(dz, z_by_z.unsqueeze(1))
            torch.mul(dr, of_n.unsqueeze(1), out=of_own).addcmul_(ds, r.unsqueeze(1))
        go_back_(de, changes, w, k, z)
        at_inputs = changes.clone()
        into = torch.mul(de[1:], s.unsqueeze(1), out=gates_of(at_inputs)[2])
        if ds is not None:
            into.add_(ds)
        return at_inputs.movedim(1, 0), changes.movedim(1, 0), de[0]

    return (gp, own, first), push
