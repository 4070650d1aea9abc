"""Products of groups of rows or columns, each group with a matrix of its own: the experts of a mixture.

A matrix of two dimensions is cut at offsets along the dimension that the groups share; one of three has a matrix for
each group. The kernel asks for strides that a direction need not have, so that maps multiply group by group.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from imstep.complexstep.registry import bilinear, rule
from imstep.complexstep.rules.forms import plus

aten = torch.ops.aten


@rule(aten._grouped_mm.default, family="multilinear", finite=partial(bilinear, factors=(0, 1)))
def grouped_mm(a, b, offs=None, bias=None, out_dtype=None):
    y = aten._grouped_mm(a, b, offs, bias, out_dtype)
    ends = None if offs is None else offs.tolist()

    def push(da, db, *_):
        first = None if da is None else _product(da, b, ends)
        return plus(first, None if db is None else _product(a, db, ends)).to(y.dtype)

    return y, push


def _product(a, b, ends):
    if ends is None:
        return a @ b
    rows, inner = b.dim() == 3, a.dim() == b.dim() == 2  # along which dimension the groups lie, if not along columns
    products = [
        u @ v
        for u, v in zip(_groups(a, ends, -2 if rows else -1), _groups(b, ends, -2 if inner else -1), strict=True)
    ]
    if inner:
        return torch.stack(products)
    # What belongs to no group is left open by the kernel; here it is zero.
    rest = (a.shape[0] if rows else b.shape[1]) - ends[-1]
    return F.pad(torch.cat(products, -2 if rows else -1), [0, 0, 0, rest] if rows else [0, rest])


def _groups(t, ends, dim):
    """The matrices of the groups."""
    if t.dim() == 3:
        return t.unbind(0)
    return [t.narrow(dim, start, end - start) for start, end in zip([0, *ends], ends, strict=False)]
