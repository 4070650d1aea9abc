"""The determinant of a matrix that is singular, or nearly so.

Where no graph of the gradient is asked for, PyTorch computes it through the LU factors, a zero pivot being lifted to
rounding level. The value of the gradient survives that, its derivative does not. The determinant is a polynomial,
smooth everywhere, and is split here into a part far from singular and one small enough to be written out. With
constants U, V from the singular value decomposition at the point,

    B = Uᴴ A V = [B₁ B₂; B₃ B₄],    det A = det U det Vᴴ det B₁ det(B₄ - B₃ B₁⁻¹ B₂),

B₁ belonging to the singular values within a factor of the largest; the last determinant goes the same way.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.registry import constant

_LIBRARY = torch.library.Library("imstep", "FRAGMENT")
_LIBRARY.define("singular_values_at_point(Tensor a) -> Tensor")
_LIBRARY.define("svd_at_point(Tensor a) -> (Tensor, Tensor, Tensor)")
_LIBRARY.impl("singular_values_at_point", torch.linalg.svdvals, "CompositeExplicitAutograd")
_LIBRARY.impl("svd_at_point", lambda a: tuple(torch.linalg.svd(a)), "CompositeExplicitAutograd")
# The real part decides; what is chosen by it does not move along.
constant(torch.ops.imstep.singular_values_at_point.default, torch.ops.imstep.svd_at_point.default)

_WRITTEN_OUT = 3  # up to this size a determinant is a sum over permutations


def is_nearly_singular(a: Tensor, *_: Any, **__: Any) -> bool:
    """Whether the LU factors of a matrix of the batch ``a`` (..., n, n) lose the second derivative of its determinant.

    They do by the square of the condition number.

    Raises:
        UnsupportedOperatorError: a matrix is singular to rounding within a transform of ``torch.func``, under which
            its determinant cannot be taken in another way.
    """
    if a.dim() < 2 or a.shape[-1] != a.shape[-2] or a.numel() == 0 or not (a.is_floating_point() or a.is_complex()):
        return False
    if torch._C._functorch.maybe_current_level() is None:
        return _smallest_share(a) <= _share(a)
    if _smallest_share(_unwrapped(a)) <= 1e3 * torch.finfo(a.dtype).eps:
        raise UnsupportedOperatorError(
            "torch.linalg.det",
            "the matrix is singular, and within torch.func its determinant has no derivatives beyond the first.",
            "Take the determinant outside the transform; it accepts batches.",
        )
    return False


def _smallest_share(a: Tensor) -> float:
    """The smallest singular value over the largest, least over the batch."""
    if not bool(a.isfinite().all()):
        return 1.0
    with torch.no_grad():
        s = torch.ops.imstep.singular_values_at_point(a)
        return float(torch.where(s[..., 0] == 0, 0, s[..., -1] / s[..., 0]).min())


def _unwrapped(a: Tensor) -> Tensor:
    """What transforms have wrapped, with the dimensions that they map over in front."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(a):
        batch = functorch.maybe_get_bdim(a)
        a = functorch.get_unwrapped(a)
        a = a if batch < 0 else a.movedim(batch, 0)
    return a


def determinant(a: Tensor) -> Tensor:
    """``torch.linalg.det`` for ``a`` (..., n, n), by operators whose derivatives of all orders exist there."""
    matrices = a.reshape(-1, *a.shape[-2:])
    return torch.stack([_of_one(m) for m in matrices.unbind(0)]).reshape(a.shape[:-2])


def _share(a: Tensor) -> float:
    return float(torch.finfo(a.dtype).eps) ** 0.2  # eps / share² is what is left: 9 digits in double precision


def _of_one(a: Tensor) -> Tensor:
    n = a.shape[-1]
    if n <= _WRITTEN_OUT:
        return _expanded(a)
    with torch.no_grad():
        u, s, vh = torch.ops.imstep.svd_at_point(a)
        k = int((s > _share(a) * s[0]).sum())
        if k == 0:
            # Zero as a whole: of degree n in its entries, so that its derivatives below the n-th vanish.
            return _product(a.diagonal())
        turn = torch.linalg.det(u) * torch.linalg.det(vh)
    return _split(a, u, vh, k) * turn


def _split(a: Tensor, u: Tensor, vh: Tensor, k: int) -> Tensor:
    b = u.mH @ a @ vh.mH
    first = torch.linalg.det(b[:k, :k])
    if k == b.shape[-1]:
        return first
    return first * _of_one(b[k:, k:] - b[k:, :k] @ torch.linalg.solve(b[:k, :k], b[:k, k:]))


def _expanded(a: Tensor) -> Tensor:
    """The sum over permutations (Leibniz)."""
    total: Any = 0.0
    for order in permutations(range(a.shape[-1])):
        inversions = sum(order[i] > order[j] for j in range(len(order)) for i in range(j))
        total = total + (-1) ** inversions * _product(torch.stack([a[i, j] for i, j in enumerate(order)]))
    return total


def _product(x: Tensor) -> Tensor:
    """Of all entries, one after the other: a zero is no exception."""
    total = x[0]
    for factor in x[1:].unbind(0):
        total = total * factor
    return total
