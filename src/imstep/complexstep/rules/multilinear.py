"""Products: d(ab) = a' b + a b', in real multiplications only, skipping an absent part."""

from __future__ import annotations

import torch

from imstep.complexstep import gemm
from imstep.complexstep.registry import Rule, multilinear, register, rule
from imstep.complexstep.rules.blocks import addcmul_, product

aten = torch.ops.aten

multilinear(aten.dot, aten.mv, aten.outer, aten.ger)


def _product(op, change, accumulate):
    """op(a, b) with a' b + a b' accumulated into one output; finite arithmetic keeps -h² a' b'.

    ``change(a, b)`` is op on one of the factors' imaginary parts, ``accumulate(c, a, b)`` adds it to c.
    """

    def linearize(func, args, kwargs):
        a, b = args

        def push(da, db):
            if da is None:
                return change(a, db)
            first = change(da, b)
            return first if db is None else accumulate(first, a, db)

        return op(a, b), push

    def finite(func, args, kwargs, ims, h):
        re, push = linearize(func, args, kwargs)
        da, db = ims
        if da is not None and db is not None and h * h != 0.0:
            re = re - h * h * op(da, db)
        return re, push(da, db)

    return Rule("multilinear", linearize, finite)


_onto = lambda c, a, b: product(a, b, onto=c)

register([aten.mm.default], _product(torch.mm, product, _onto))
register([aten.bmm.default], _product(torch.bmm, product, _onto))
register([aten.mul.Tensor], _product(torch.mul, torch.mul, addcmul_))


def _of_transposed(matrices):
    """The rule of X Wᵀ from that of A B."""

    def linearize(func, args, kwargs):
        y, push = matrices.linearize(func, (args[0], args[1].t()), {})
        return y, lambda dx, dw, *_: push(dx, None if dw is None else dw.mT)

    def finite(func, args, kwargs, ims, h):
        return matrices.finite(func, (args[0], args[1].t()), {}, (ims[0], None if ims[1] is None else ims[1].mT), h)

    return Rule("multilinear", linearize, finite)


if gemm.OPERATOR is not None:
    register([gemm.OPERATOR], _of_transposed(_product(gemm.multiply, product, _onto)))


@rule(aten.mul.Scalar, family="linear")
def mul_scalar(x, c):
    return torch.mul(x, c), lambda dx: dx * c
