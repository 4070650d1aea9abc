"""Points where an equation is missed most, with the weights that keep a mean what it is over the domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from imstep.pde.adaptive import sizes_of
from imstep.pde.even import bounds_of

_NARROWEST = 0.1
"""Of a box that is cut in two: the least part on either side, as few points say little of what lies between them."""


def weighted_points(
    residual: Callable[[Tensor], Tensor],
    sides: Sequence[tuple[float, float]],
    count: int,
    *,
    power: float = 2.0,
    floor: float = 1.0,
    candidates: int = 2,
    rounds: int = 2,
    generator: Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Points of a box, closer where residuals are large, and weights with which means are still those over the box.

        density of x  ∝  |ρ(x)|^power / mean of |ρ|^power + floor
        E mean of weight · f(point) = mean of f over the box

    for every function f, however few the points. The box is cut into as many smaller ones as there are points, each
    with about the same share of the density, and each has one point, at random; its weight is the volume of its box.

    Where residuals are large in a small part of a domain, as in a shock, points that are distributed evenly leave that
    part to chance. Without weights (:func:`adaptive_points`) the loss is another one at each step; with them it stays,
    and is only known better.

    Args:
        residual: of points (k, d), (k,) or (k, m): what is missed there; of m components the norm counts. Where it
            is not finite it counts as the largest that is.
        sides: the least and the largest value of each coordinate; the same twice for a face.
        count: points wanted, >= 1.
        power: > 0; with 2 as many points as the part's share of the loss.
        floor: >= 0; the larger, the more evenly they lie. Where residuals are small weights are up to about
            (1 + floor) / floor.
        candidates: residuals that are looked at in each round, as a multiple of ``count``, >= 1.
        rounds: >= 1; each looks closer at what the last one has found.
        generator: of random numbers, on the CPU; None for PyTorch's own.
        dtype, device: of the points; None for PyTorch's defaults. All devices have the same points.

    Returns:
        Points, (count, d), and weights, of as many dimensions as residuals, mean about 1: (count,), or (count, 1), as
        for ``(weights * residual(points).square()).mean()``. Neither has a graph.

    Raises:
        ValueError: a number is out of range; residuals are not one a point.

    Cost: rounds · candidates · count residuals, without derivatives by parameters, and as many numbers sorted some
        log2 count times.

    Source: importance sampling with boxes of equal shares as in VEGAS (Lepage, J. Comput. Phys. 27 (1978), p. 192),
        which are cut as in a k-d tree; that the residual decides is from Wu et al. (arXiv 2207.10289). The defaults are
        our own: docs/redrawn-points.md.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> steep = lambda x: torch.exp(-(x / 0.01) ** 2)
        >>> x, weights = weighted_points(steep, [(-1.0, 1.0)], 200)
        >>> bool((x.abs() < 0.02).sum() > 50)  # of 200 that lie evenly, 4
        True
        >>> round(float((weights * x**2).mean()), 2)  # 1/3 over the box
        0.33
    """
    low, high = bounds_of(sides)
    if not (0 < power < math.inf and 0 <= floor < math.inf):
        raise ValueError(f"power is positive and floor at least 0, got {power} and {floor}.")
    if min(count, candidates, rounds) < 1:
        raise ValueError(f"count, candidates and rounds are at least 1, got {count}, {candidates} and {rounds}.")
    to = {"dtype": dtype or torch.get_default_dtype(), "device": device or torch.get_default_device()}
    placed = lambda unit: (low + (high - low) * unit).to(**to)
    uniform = lambda rows: torch.rand(rows, len(low), generator=generator, dtype=torch.float64, device="cpu")
    unit = uniform(candidates * count)
    weights = torch.ones_like(unit[:, 0])
    for boxes in (*[candidates * count] * (rounds - 1), count):
        sizes, dimensions = sizes_of(residual, placed(unit))
        mass = _masses(sizes.cpu(), weights, power)
        below, above = _boxes(unit, mass, floor, high > low, boxes)
        unit = below + (above - below) * uniform(len(below))
        weights = len(below) * (above - below).prod(1)
    points = placed(unit)
    return points, weights.reshape(-1, *[1] * (dimensions - 1)).to(points)


def _masses(sizes: Tensor, weights: Tensor, power: float) -> Tensor:
    """What each point stands for of the part of the density that residuals make, (k,); 1 in all, or 0."""
    largest = sizes[sizes.isfinite()].max() if bool(sizes.isfinite().any()) else sizes.new_zeros(())
    if largest == 0:
        return torch.zeros_like(sizes)
    mass = weights * (sizes.nan_to_num(math.inf).clamp(max=largest) / largest) ** power
    return mass / mass.sum()


def _boxes(x: Tensor, mass: Tensor, floor: float, free: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Boxes with about the same mass that make up the unit cube, (count, d) each: their lower and upper corners.

    Every box that is to become c > 1 boxes is cut across its longest side, into c/2 and c/2, rounded up and down.

    Args:
        x: points of the cube, (k, d).
        mass: of each, (k,), >= 0.
        floor: mass that is spread evenly over the cube, >= 0.
        free: whether a coordinate may be cut, (d,).
    """
    below, above = x.new_zeros(1, x.shape[1]), x.new_ones(1, x.shape[1])
    parts, owner = torch.tensor([count], device=x.device), torch.zeros(len(x), dtype=torch.long, device=x.device)
    while int(parts.max()) > 1:
        axis = ((above - below) * free).argmax(1, keepdim=True)
        start, end = below.gather(1, axis)[:, 0], above.gather(1, axis)[:, 0]
        at = x.gather(1, axis[owner])[:, 0]
        lower = (parts + 1) // 2
        even = floor * (above - below).prod(1)
        cut = _cuts((at - start[owner]) / (end - start)[owner], mass, owner, even, lower / parts)
        cut = torch.where(parts > 1, start + cut * (end - start), end)
        below = torch.stack([below, below.scatter(1, axis, cut[:, None])], 1).flatten(0, 1)
        above = torch.stack([above.scatter(1, axis, cut[:, None]), above], 1).flatten(0, 1)
        parts, owner = torch.stack([lower, parts - lower], 1).flatten(), 2 * owner + (at > cut[owner])
        kept = parts > 0  # a box that is not cut has no upper part
        below, above, parts, owner = below[kept], above[kept], parts[kept], (kept.cumsum(0) - 1)[owner]
    return below, above


def _cuts(at: Tensor, mass: Tensor, owner: Tensor, even: Tensor, share: Tensor) -> Tensor:
    """Where a share of the mass in each box lies below, (boxes,), in [0, 1].

    Args:
        at: where points are in their box, (k,), in [0, 1].
        mass, owner: of points, and the box that each is in, (k,).
        even: mass that is spread evenly over each box, (boxes,).
        share: (boxes,), in (0, 1).
    """
    order = (owner + at.clamp(max=1 - 1e-9)).argsort()
    at, mass, owner = at[order], mass[order], owner[order]
    total = torch.bincount(owner, mass, len(share)) + even
    until = total.cumsum(0)
    before = until - total
    wanted = before + share * total
    # Half of a point's mass lies on either side of it, and between points, or a point and an edge, mass lies evenly.
    below = mass.cumsum(0) - mass / 2 + ((even.cumsum(0) - even)[owner] + even[owner] * at)
    right, box = torch.searchsorted(below, wanted), torch.arange(len(share), device=share.device)

    def knot(index: Tensor, edge: float, at_edge: Tensor) -> tuple[Tensor, Tensor]:
        """A point's place and the mass below it; those of the box's edge where it is in another box."""
        near = index.clamp(0, len(at) - 1)
        inside = (near == index) & (owner[near] == box)
        return torch.where(inside, at[near], edge), torch.where(inside, below[near], at_edge)

    (left_at, left_mass), (right_at, right_mass) = knot(right - 1, 0.0, before), knot(right, 1.0, until)
    part = ((wanted - left_mass) / (right_mass - left_mass)).nan_to_num(0.5).clamp(0, 1)
    cut = torch.where(total > 0, left_at + part * (right_at - left_at), share)
    return cut.clamp(_NARROWEST, 1 - _NARROWEST)
