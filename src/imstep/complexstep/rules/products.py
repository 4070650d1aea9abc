"""Products of matrices with sums, and products with structure.

    d(beta C + alpha A B) = beta C' + alpha (A' B + A B')

Kernels that add into their output carry the terms, so that no temporary is made for them.
"""

from __future__ import annotations

import torch

from imstep.complexstep.registry import Rule, multilinear, register
from imstep.complexstep.rules.forms import total

aten = torch.ops.aten


def _sum_and_product(op, product, accumulate):
    """beta C + alpha (A, B): ``product(a, b)`` and ``accumulate(c, a, b)`` = c + (a, b)."""

    def linearize(func, args, kwargs):
        _, a, b = args[:3]
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)

        def push(dc, da, db):
            change = None if dc is None or beta == 0 else (dc if beta == 1 else dc * beta)
            for x, y in ((da, b), (a, db)):
                if x is None or y is None:
                    continue
                if change is None:
                    change = product(x, y) if alpha == 1 else product(x, y) * alpha
                else:
                    change = accumulate(change, x, y, alpha)
            return change

        return func(*args, **kwargs), push

    def finite(func, args, kwargs, ims, h):
        re, push = linearize(func, args, kwargs)
        _, da, db = ims
        if da is not None and db is not None and h * h != 0.0:
            re = re - h * h * kwargs.get("alpha", 1) * product(da, db)
        return re, push(*ims)

    register([op], Rule("multilinear", linearize, finite))


_sum_and_product(aten.addmm.default, torch.mm, lambda c, a, b, alpha: torch.addmm(c, a, b, alpha=alpha))
_sum_and_product(aten.addmv.default, torch.mv, lambda c, a, b, alpha: torch.addmv(c, a, b, alpha=alpha))
_sum_and_product(aten.addr.default, torch.outer, lambda c, a, b, alpha: torch.addr(c, a, b, alpha=alpha))
_sum_and_product(aten.baddbmm.default, torch.bmm, lambda c, a, b, alpha: torch.baddbmm(c, a, b, alpha=alpha))
_sum_and_product(
    aten.addbmm.default, lambda a, b: torch.bmm(a, b).sum(0), lambda c, a, b, alpha: torch.addbmm(c, a, b, alpha=alpha)
)

multilinear(aten.linalg_cross.default)


def _three_factors(op, factors):
    """Operators linear in each of three tensor arguments."""

    def linearize(func, args, kwargs):
        def push(*ims):
            terms = (func(*args[:i], ims[i], *args[i + 1 :], **kwargs) for i in range(factors) if ims[i] is not None)
            return total(*terms)

        return func(*args, **kwargs), push

    register([op], Rule("multilinear", linearize))


_three_factors(aten._trilinear.default, 3)
