"""Products: d(ab) = a' b + a b', in real multiplications only, skipping an absent part."""

from __future__ import annotations

import torch

from imstep.complexstep.registry import Rule, multilinear, register, rule
from imstep.complexstep.rules.forms import addcmul_, addmm_, baddbmm_

aten = torch.ops.aten

multilinear(aten.dot, aten.mv, aten.outer, aten.ger)


def _product(op, accumulate):
    """op(a, b) with a' b + a b' accumulated into one output; finite arithmetic keeps -h² a' b'."""

    def linearize(func, args, kwargs):
        a, b = args

        def push(da, db):
            if da is None:
                return op(a, db)
            first = op(da, b)
            return first if db is None else accumulate(first, a, db)

        return op(a, b), push

    def finite(func, args, kwargs, ims, h):
        re, push = linearize(func, args, kwargs)
        da, db = ims
        if da is not None and db is not None and h * h != 0.0:
            re = re - h * h * op(da, db)
        return re, push(da, db)

    return Rule("multilinear", linearize, finite)


register([aten.mm.default], _product(torch.mm, addmm_))
register([aten.bmm.default], _product(torch.bmm, baddbmm_))
register([aten.mul.Tensor], _product(torch.mul, addcmul_))


@rule(aten.mul.Scalar, family="linear")
def mul_scalar(x, c):
    return torch.mul(x, c), lambda dx: dx * c
