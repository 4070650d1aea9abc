"""Operators linear in one tensor argument: the same operator on the imaginary part.

y = L(x; constants)   =>   dy = L(dx; constants)
"""

from __future__ import annotations

import torch

from imstep.complexstep.registry import exact, linear, rule
from imstep.complexstep.rules.forms import plus, zeros_of

aten = torch.ops.aten

# Views need no rule (see imstep.complexstep.tensor); these copy.
linear(aten.neg, aten.view_copy, aten.flip, aten.roll, aten.repeat)
linear(aten.select_copy.int, aten.slice_copy.Tensor)
linear(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cumsum)
linear(aten.gather, aten.take, aten.masked_select, aten.index.Tensor)
linear(aten.tril, aten.triu, aten.diag_embed, aten.unfold_backward, aten.select_backward, aten.slice_backward)
linear(aten.diagonal_backward, aten.value_selecting_reduction_backward, aten.embedding_dense_backward)


def _scaled(dx, factor):
    return dx if factor == 1 or dx is None else dx * factor


@rule(aten.constant_pad_nd.default, family="linear", finite=exact)
def constant_pad(x, pad, value=0):
    return aten.constant_pad_nd(x, pad, value), lambda dx: aten.constant_pad_nd(dx, pad)


@rule(aten.add.Tensor, family="linear", finite=exact)
def add(x, y, *, alpha=1):
    return torch.add(x, y, alpha=alpha), lambda dx, dy: plus(dx, _scaled(dy, alpha))


@rule(aten.sub.Tensor, family="linear", finite=exact)
def sub(x, y, *, alpha=1):
    return torch.sub(x, y, alpha=alpha), lambda dx, dy: plus(dx, _scaled(dy, -alpha))


@rule(aten.rsub.Scalar, family="linear", finite=exact)
def rsub(x, other, alpha=1):
    return torch.rsub(x, other, alpha=alpha), lambda dx: dx * -alpha


@rule(aten.clone.default, family="linear", finite=exact)
def clone(x, *, memory_format=None):
    # An alias will do: what is attached to the fresh tensor is laid out like it.
    return torch.clone(
        x, memory_format=memory_format or torch.preserve_format
    ), lambda dx: dx.resolve_conj().resolve_neg()


@rule(aten._to_copy.default, family="linear", finite=exact)
def to_copy(x, **kwargs):
    y = aten._to_copy(x, **kwargs)
    if not (y.is_floating_point() or y.is_complex()):
        return y, None
    dtype, device, real = y.dtype, y.device, not y.is_complex()
    return y, lambda dx: (dx.real if real and dx.is_complex() else dx).to(device, dtype)


def _joined(op):
    def joined(tensors, dim=0):
        absent = [zeros_of(x) for x in tensors]

        def push(dxs):
            return op([zero if dx is None else dx for zero, dx in zip(absent, dxs, strict=True)], dim)

        return op(tensors, dim), push

    return joined


for _op in (aten.cat.default, aten.stack.default):
    rule(_op, family="linear", finite=exact)(_joined(_op))
