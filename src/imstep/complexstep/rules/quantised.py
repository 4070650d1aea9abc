"""Fake quantisation, whose derivative is 1 within the range and 0 beyond, as autograd has it: straight through."""

from __future__ import annotations

import torch

from imstep.complexstep.registry import exact, rule

aten = torch.ops.aten


def _straight_through(op):
    def fake_quantise(x, *args):
        y, inside = op(x, *args)
        return (y, inside), lambda dx, *_: (None if dx is None else torch.where(inside, dx, 0), None)

    return fake_quantise


for _op in (
    aten.fake_quantize_per_tensor_affine_cachemask.default,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default,
    aten.fake_quantize_per_channel_affine_cachemask.default,
    aten._fused_moving_avg_obs_fq_helper.default,
):
    rule(_op, family="piecewise", finite=exact)(_straight_through(_op))
