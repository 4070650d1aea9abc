"""Inner products of vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imstep.linalg.sharded import ShardedTensor, summed_over_rows


def dots(*pairs: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """Inner products of pairs of vectors (n,), also where those of entries leave the range of float32.

    With one synchronisation of the device for all of them; with two outside that range.
    """
    dtype = pairs[0][0].dtype
    found, limits = _dots(pairs, dtype), torch.finfo(dtype)
    if dtype is torch.float64 or all(limits.tiny / limits.eps < abs(x) < math.inf for x in found):
        return found
    return _dots(pairs, torch.float64)


def _dots(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[float, ...]:
    sharded = [v for pair in pairs for v in pair if isinstance(v, ShardedTensor)]
    if sharded:
        return tuple(sharded[0].dots(pairs, dtype).tolist())
    return tuple(torch.stack([torch.dot(a.to(dtype), b.to(dtype)) for a, b in pairs]).tolist())


def norm_in_range(vector: Tensor, norm: float | None = None) -> float:
    """The Euclidean norm of a vector (n,), also where the squares of its entries leave the range of its dtype.

    Args:
        vector: any.
        norm: as the dtype has it, where that is known already.
    """
    norm = float(vector.norm()) if norm is None else norm
    limits = torch.finfo(vector.dtype)
    if math.sqrt(limits.tiny / limits.eps) < norm < math.inf:
        return norm
    unit = 2.0 ** (math.frexp(limits.max)[1] // 2)
    return float((vector / unit).norm()) * unit if norm > 1 else float((vector * unit).norm()) / unit


def unit_of(vector: Tensor) -> float:
    """The power of two by which a vector (n,), times it, is about 1 long; 1 for one that vanishes or is not finite."""
    norm = norm_in_range(vector)
    return 2.0 ** -max(-126, min(round(math.log2(norm)), 126)) if 0 < norm < math.inf else 1.0


_STRETCH = 2**16


def row_dots(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of the rows of two blocks (k, n), row by row: (k,), float64.

    On a CPU a stretch at a time, which keeps float32's digits and takes a fifth of the time of `torch.linalg.vecdot`.
    """
    return summed_over_rows(first, second, _row_dots)


def _row_dots(first: Tensor, second: Tensor) -> Tensor:
    if first.device.type != "cpu":
        return torch.linalg.vecdot(first, second).double()
    of_rows = lambda x, y: sum(
        float(torch.dot(a, b)) for a, b in zip(x.split(_STRETCH), y.split(_STRETCH), strict=True)
    )
    return torch.tensor([of_rows(x, y) for x, y in zip(first, second, strict=True)], dtype=torch.float64)
