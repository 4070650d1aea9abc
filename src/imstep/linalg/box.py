"""Least squares with bounds on the variables."""

from __future__ import annotations

import torch
from torch import Tensor

_RELEASE = 1e-14
"""Of the largest slope: less at a bound is rounding, and releases nothing."""


def box_least_squares(matrix: Tensor, target: Tensor, damping: float, lower: Tensor, upper: Tensor) -> Tensor:
    """The minimiser of ‖A x - b‖² + λ‖x‖² with lower <= x <= upper.

    Active sets: the variables at a bound are held there and the others solved for. Where that leads beyond bounds, x
    goes as far as to the first of them, which then holds; where it does not, the variable with the largest slope away
    from its bound is released. The minimum falls with each release, so that it ends.

    Args:
        matrix: A, (m, n).
        target: b, (m,).
        damping: λ > 0.
        lower, upper: (n,), lower <= upper; infinite where there is none.

    Cost: a factorisation of at most (m + n) n numbers for each set.

    Source: Stark and Parker, Bounded-variable least squares, Computational Statistics 10 (1995), 129-141; it starts
        with the bounds that the solution without them violates, our choice.

    Example:
        >>> x = box_least_squares(torch.eye(2), torch.tensor([3.0, -1.0]), 1e-9, torch.zeros(2), torch.full((2,), 2.0))
        >>> x.round(decimals=4)
        tensor([2., 0.])
    """
    n = matrix.shape[1]
    stacked = torch.cat([matrix, damping**0.5 * torch.eye(n, dtype=matrix.dtype, device=matrix.device)])
    right = torch.cat([target, target.new_zeros(n)])
    fixed = lower == upper
    x = _on_face(stacked, right, lower, fixed)
    x, held = x.clamp(lower, upper), (x <= lower) | (x >= upper) | fixed
    for _ in range(10 * n + 10):
        wanted = _on_face(stacked, right, x, held)
        x, hit = _towards(x, wanted, held, lower, upper)
        if bool(hit.any()):
            held = held | hit
            continue
        slope = stacked.mT @ (stacked @ x - right)
        outward = torch.where(x <= lower, slope, -slope)  # >= 0 where the bound is right to hold
        wrong = held & ~fixed & (outward < -_RELEASE * float((stacked.abs().mT @ right.abs()).max()))
        if not bool(wrong.any()):
            break
        held = held.clone()
        held[torch.where(wrong, outward, torch.inf).argmin()] = False
    return x


def _on_face(matrix: Tensor, target: Tensor, x: Tensor, held: Tensor) -> Tensor:
    """The minimiser with the entries of x that are held as they are."""
    if bool(held.all()):
        return x
    right = target if not bool(held.any()) else target - matrix[:, held] @ x[held]
    q, r = torch.linalg.qr(matrix[:, ~held])
    found = x.clone()
    found[~held] = torch.linalg.solve_triangular(r, (q.mT @ right)[:, None], upper=True)[:, 0]
    return found


def _towards(x: Tensor, wanted: Tensor, held: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The last point of the segment from x that is within the bounds, and which of them, new ones, end it."""
    beyond = ~held & ((wanted < lower) | (wanted > upper))
    if not bool(beyond.any()):
        return wanted, beyond
    bound = torch.where(wanted < lower, lower, upper)
    share = torch.where(beyond, (bound - x) / (wanted - x), torch.inf)
    least = share.min()
    hit = beyond & (share <= least)
    moved = torch.where(held, x, x + least * (wanted - x)).clamp(lower, upper)
    return torch.where(hit, bound, moved), hit
