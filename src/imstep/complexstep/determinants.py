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


def adjugate(a: Tensor) -> Tensor:
    """det(A) A⁻¹ for ``a`` (..., n, n), singular or not, by operators whose derivatives of all orders exist there."""
    if a.shape[-1] == 1:
        return torch.ones_like(a)
    if a.numel() == 0 or _smallest_share(a) > _share(a):
        return torch.ops.aten._linalg_det(a)[0][..., None, None] * torch.linalg.inv_ex(a)[0]
    matrices = a.reshape(-1, *a.shape[-2:])
    return torch.stack([_adjugate_of_one(m) for m in matrices.unbind(0)]).reshape(a.shape)


def _of_one(a: Tensor, scale: float = 0.0) -> Tensor:
    """The determinant of a matrix that is part of one whose largest singular value is ``scale``."""
    if a.shape[-1] <= _WRITTEN_OUT:
        return _expanded(a)
    u, vh, k, scale = _at_point(a, scale)
    return _faddeev(a)[0] if k == 0 else _split(a, u, vh, k, scale) * (torch.linalg.det(u) * torch.linalg.det(vh))


def _adjugate_of_one(a: Tensor, scale: float = 0.0) -> Tensor:
    n = a.shape[-1]
    if n <= _WRITTEN_OUT:
        return _cofactors(a)
    u, vh, k, scale = _at_point(a, scale)
    if k == 0:
        return _faddeev(a)[1]
    b = u.mH @ a @ vh.mH
    inverse = torch.linalg.inv(b[:k, :k])
    right, left = inverse @ b[:k, k:], b[k:, :k] @ inverse
    rest = b[k:, k:] - b[k:, :k] @ right
    within = _adjugate_of_one(rest, scale)
    above = torch.cat([inverse * _of_one(rest, scale) + right @ within @ left, -right @ within], 1)
    whole = torch.cat([above, torch.cat([-within @ left, within], 1)])
    turn = torch.linalg.det(u) * torch.linalg.det(vh) * torch.linalg.det(b[:k, :k])
    return turn * (vh.mH @ whole @ u.mH)


def _at_point(a: Tensor, scale: float) -> tuple[Tensor, Tensor, int, float]:
    """Singular vectors, how many belong to values within a factor of the largest (0 if all is rounding), the scale."""
    with torch.no_grad():
        u, s, vh = torch.ops.imstep.svd_at_point(a)
        largest = float(s[0])
        rounding = 1e3 * torch.finfo(a.dtype).eps * scale
        return u, vh, int((s > max(_share(a) * largest, rounding)).sum()), max(scale, largest)


def _split(a: Tensor, u: Tensor, vh: Tensor, k: int, scale: float) -> Tensor:
    b = u.mH @ a @ vh.mH
    first = torch.linalg.det(b[:k, :k])
    if k == b.shape[-1]:
        return first
    return first * _of_one(b[k:, k:] - b[k:, :k] @ torch.linalg.solve(b[:k, :k], b[:k, k:]), scale)


def _faddeev(a: Tensor) -> tuple[Tensor, Tensor]:
    """Determinant and adjugate as polynomials in the entries (Faddeev and LeVerrier), to rounding of powers of them."""
    n = a.shape[-1]
    one = torch.eye(n, dtype=a.dtype, device=a.device)
    adjugate = one
    for k in range(1, n):
        product = a @ adjugate
        adjugate = product - product.diagonal().sum() / k * one
    determinant = (a @ adjugate).diagonal().sum() / n
    sign = -1 if n % 2 == 0 else 1
    return sign * determinant, sign * adjugate


def _cofactors(a: Tensor) -> Tensor:
    n = a.shape[-1]
    if n == 1:
        return torch.ones_like(a)
    rows = [[at for at in range(n) if at != out] for out in range(n)]
    cofactor = lambda i, j: (-1) ** (i + j) * _expanded(a[rows[i]][:, rows[j]])
    return torch.stack([torch.stack([cofactor(i, j) for i in range(n)]) for j in range(n)])


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
