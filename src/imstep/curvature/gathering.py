"""What the uses of a parameter add to its gradient rows, put where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from imstep.curvature.gradient_rows import GradientRows, OuterRows, PlainRows, sum_of_products
from imstep.curvature.use import Rows

Target = slice | Tensor
"""Rows of a matrix: at even distances, or one by one."""

_PARALLEL = 64
"""Roundings by which multiples of a vector may miss it."""

_COMPARED = 8
"""Products of a residual at most whose factors are compared: there are half as many pairs as their square."""


def values_of(flags: Sequence[Tensor]) -> list[bool]:
    """The values of flags (0-dim), with one synchronisation of the device for all of them."""
    return torch.stack(list(flags)).tolist() if flags else []


class Places:
    """Where the addends of a parameter go, given the residuals that they belong to.

    Outer products are put side by side in slots, as few as do. Those with multiples of one left factor are one:

        l rᵀ + c l qᵀ = l (r + c q)ᵀ

    as those of derivatives are in which an equation is linear.

    Args:
        owners: of the addends of each use, (R,); -1 for none.
        outer: whether these are outer products.
        count: N.
    """

    def __init__(self, owners: Sequence[Tensor], outer: Sequence[bool], count: int) -> None:
        self._owners, self._outer, self._count = list(owners), list(outer), count
        whole = values_of([(owner >= 0).all() for owner in owners])
        self._live = [None if all_ else owner >= 0 for owner, all_ in zip(owners, whole, strict=True)]
        own = [owner if live is None else owner[live] for owner, live in zip(owners, self._live, strict=True)]
        self._targets = [_even(owner) for owner in own]
        products = [owner for owner, is_outer in zip(own, outer, strict=True) if is_outer]
        self._lanes = [lane for use, owner in enumerate(products) for lane in _lanes(use, owner)]
        self._multiples: list[tuple[int, int]] | None = None  # lanes, each with an earlier one; None where unknown
        self._slots: list[tuple[int | Tensor, Target]] = []  # of each other lane's products the slot, and the residual
        self._most, self._filled = 1, False

    def are_of(self, owners: Sequence[Tensor], outer: Sequence[bool], count: int) -> bool:
        """Whether these were found for the same owners, the very tensors."""
        same = len(owners) == len(self._owners) and all(map(is_, owners, self._owners))
        return same and count == self._count and list(outer) == self._outer

    def _number(self, owners: Sequence[Tensor]) -> None:
        """Sort outer products by residual: the s-th of each goes to slot s."""
        owner, count = torch.cat(list(owners)), self._count
        order = owner.argsort(stable=True)
        sizes = torch.bincount(owner, minlength=count)
        slot = torch.empty_like(owner)
        slot[order] = torch.arange(len(owner), device=owner.device) - (sizes.cumsum(0) - sizes)[owner[order]]
        self._most = max(int(sizes.max()), 1)
        self._filled = self._most * count == len(owner)
        self._slots = []
        for at, own in zip(slot.split([len(own) for own in owners]), owners, strict=True):
            slots = at.unique().tolist()
            several = len(slots) != 1
            self._slots.append((at if several else slots[0], own if several else _even(own)))

    def gathered(self, pieces: Sequence[Rows], entries: int) -> GradientRows:
        """The gradient rows of the parameter, in float64.

        Args:
            pieces: the addends.
            entries: of the parameter.
        """
        pieces = [rows if live is None else _of(rows, live) for rows, live in zip(pieces, self._live, strict=True)]
        products = [(rows.left, rows.right) for rows in pieces if rows.right is not None]
        left, right = self._in_slots(products) if products else (None, None)
        plain = [(rows.left, at) for rows, at in zip(pieces, self._targets, strict=True) if rows.right is None]
        if left is not None and right is not None and not plain:
            m, _, width = left.shape
            if m * m * (width + right.shape[2]) < entries:
                return OuterRows(left, right)
            return PlainRows(sum_of_products(left, right))
        whole = torch.zeros(self._count, entries, dtype=torch.float64, device=self._owners[0].device)
        for addends, at in plain:
            if isinstance(at, slice):
                whole[at] += addends
            else:
                whole.index_add_(0, at, addends.double())
        if left is not None and right is not None:
            whole += sum_of_products(left, right)
        return PlainRows(whole)

    def _in_slots(self, products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The factors (m, N, out) and (m, N, in) of sums of m products."""
        lanes = self._lanes
        left = dict(enumerate(products[lane.use][0][lane.rows].double() for lane in lanes))
        right = dict(enumerate(products[lane.use][1][lane.rows].double() for lane in lanes))
        eps = max(torch.finfo(factor.dtype).eps for factor, _ in products)
        found = []
        for t, s in _pairs(lanes) if self._multiples is None else self._multiples:
            factors = _multiple(left[t], left[s], _PARALLEL * eps) if t in left else None
            if factors is not None:
                right[s] = torch.addcmul(right[s], factors, right.pop(t))
                del left[t]
                found.append((t, s))
        if found != self._multiples:
            self._multiples = found
            self._number([lanes[at].owner for at in left])
        return self._padded(list(left.values())), self._padded(list(right.values()))

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        make = torch.empty if self._filled else torch.zeros
        shape, device = (self._most, self._count, parts[0].shape[1]), self._owners[0].device
        whole = make(shape, dtype=torch.float64, device=device)
        for part, (slot, at) in zip(parts, self._slots, strict=True):
            whole[slot, at] = part
        return whole


@dataclass(frozen=True, eq=False)
class _Lane:
    """Outer products of a use, one for each of some residuals; or all of them, in any order.

    Attributes:
        use: among those that add outer products.
        rows: of the use.
        owner: the residuals.
    """

    use: int
    rows: slice
    owner: Tensor


def _lanes(use: int, owner: Tensor) -> list[_Lane]:
    """The products of a use; apart where it has its residuals several times, in the same order."""
    again = (owner[1:] == owner[:1]).nonzero()[:1, 0].tolist()
    length = again[0] + 1 if again else len(owner)
    times = len(owner) // max(length, 1)
    if not 1 < times <= _COMPARED or not torch.equal(owner, owner[:length].repeat(times)):
        return [_Lane(use, slice(None), owner)]
    return [_Lane(use, slice(at * length, (at + 1) * length), owner[:length]) for at in range(times)]


def _pairs(lanes: Sequence[_Lane]) -> list[tuple[int, int]]:
    """Lanes of the same residuals, the later of two first."""
    count = len(lanes) if len(lanes) <= _COMPARED else 0
    pairs = ((t, s) for t in reversed(range(count)) for s in range(t))
    return [(t, s) for t, s in pairs if torch.equal(lanes[t].owner, lanes[s].owner)]


def _multiple(of: Tensor, other: Tensor, tolerance: float) -> Tensor | None:
    """The factors (R, 1) that make rows of the others, (R, width); None where some are no multiples."""
    length = other.square().sum(1, keepdim=True)
    factors = torch.where(length > 0, (of * other).sum(1, keepdim=True) / length, 0.0)
    missed = torch.addcmul(of, factors, other, value=-1).abs().amax(1)
    close = missed <= tolerance * of.abs().amax(1)
    return factors if bool(close.all()) else None


def _even(owner: Tensor) -> Target:
    """The residuals (R,), as a slice where they are at even distances."""
    if len(owner) == 0:
        return slice(0, 0)
    first, step, count = int(owner[0]), 1 if len(owner) == 1 else int(owner[1] - owner[0]), len(owner)
    if step < 1 or not bool((owner.diff() == step).all()):
        return owner
    return slice(first, first + step * count, step)


def _of(rows: Rows, live: Tensor) -> Rows:
    return Rows(rows.left[live], None if rows.right is None else rows.right[live])


class KnownPlaces:
    """Places that were found, by parameter and member of a stack."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Places] = {}
        self._runs: dict[tuple[int, int, torch.device], Tensor] = {}

    def run(self, start: int, end: int, device: torch.device) -> Tensor:
        """The residuals from one to another, in the same tensor each time."""
        key = start, end, device
        if key not in self._runs:
            self._runs[key] = torch.arange(start, end, device=device)
        return self._runs[key]

    def gather(
        self, at: tuple[int, int], pieces: Sequence[tuple[Rows, Tensor]], count: int, entries: int
    ) -> GradientRows:
        """The gradient rows of one parameter from what its uses add, in float64.

        Args:
            at: the parameter, and the member.
            pieces: addends, each with the residuals (R,) that they belong to; -1 for none.
            count: N.
            entries: of the parameter.
        """
        owners, outer = [owner for _, owner in pieces], [rows.right is not None for rows, _ in pieces]
        places = self._found.get(at)
        if places is None or not places.are_of(owners, outer, count):
            places = self._found[at] = Places(owners, outer, count)
        return places.gathered([rows for rows, _ in pieces], entries)
