"""Products of matrices with sums, and products with structure.

    d(beta C + alpha A B) = beta C' + alpha (A' B + A B')

Kernels that add into their output carry the terms, so that no temporary is made for them.
"""

from __future__ import annotations

import torch

from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.registry import Rule, multilinear, register, rule
from imstep.complexstep.rules.blocks import product
from imstep.complexstep.rules.forms import add_, total

aten = torch.ops.aten


def _sum_and_product(op, product, accumulate):
    """beta C + alpha (A, B): ``product(a, b)``, fresh, and ``accumulate(c, a, b)`` = c + (a, b), c being fresh.

    C' comes last: it may be one row for all.
    """

    def linearize(func, args, kwargs):
        _, a, b = args[:3]
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)

        def push(dc, da, db):
            dc = None if dc is None or beta == 0 else (dc if beta == 1 else dc * beta)
            change = None if da is None else product(da, b)
            if db is not None:
                change = product(a, db) if change is None else accumulate(change, a, db)
            if change is None:
                return dc
            change = change if alpha == 1 else change.mul_(alpha)
            return change if dc is None else add_(change, dc)

        return func(*args, **kwargs), push

    def finite(func, args, kwargs, ims, h):
        re, push = linearize(func, args, kwargs)
        _, da, db = ims
        if da is not None and db is not None and h * h != 0.0:
            re = re - h * h * kwargs.get("alpha", 1) * product(da, db)
        return re, push(*ims)

    register([op], Rule("multilinear", linearize, finite))


_onto = lambda c, a, b: product(a, b, onto=c)

_sum_and_product(aten.addmm.default, product, _onto)
_sum_and_product(aten._sparse_addmm.default, product, _onto)
_sum_and_product(aten.addmv.default, torch.mv, torch.addmv)
_sum_and_product(aten.addr.default, torch.outer, torch.addr)
_sum_and_product(aten.baddbmm.default, product, _onto)
_sum_and_product(aten.addbmm.default, lambda a, b: torch.bmm(a, b).sum(0), torch.addbmm)

multilinear(aten.linalg_cross.default)


@rule(aten.sspaddmm.default, family="multilinear")
def sspaddmm(c, a, b, beta=1, alpha=1):
    raise UnsupportedOperatorError(
        "torch.smm",
        "its result is sparse, and carries no imaginary part.",
        "Use torch.sparse.mm, whose result is dense.",
    )


def _three_factors(op, factors):
    """Operators linear in each of three tensor arguments."""

    def linearize(func, args, kwargs):
        def push(*ims):
            terms = (func(*args[:i], ims[i], *args[i + 1 :], **kwargs) for i in range(factors) if ims[i] is not None)
            return total(*terms)

        return func(*args, **kwargs), push

    register([op], Rule("multilinear", linearize))


_three_factors(aten._trilinear.default, 3)
