"""What the uses of a parameter add to its gradient rows, put where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
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
"""Products of a residual at most whose factors are compared; there are half as many pairs as their square."""


def values_of(flags: Sequence[Tensor]) -> list[bool]:
    """The values of flags (0-dim), with one synchronisation of the device for all of them."""
    return torch.stack(list(flags)).tolist() if flags else []


class Places:
    """Where the addends of a parameter go, given the residuals that they belong to.

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
        self._slots: list[tuple[int | Tensor, Target]] = []  # of each outer product the slot, and the residual
        self._most, self._filled = 1, False
        self._multiples: list[tuple[int, int]] | None = None  # slots, each with an earlier one; None where unknown
        products = [owner for owner, is_outer in zip(own, outer, strict=True) if is_outer]
        if products:
            self._number(products)

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
        left, right = map(self._padded, zip(*products, strict=True)) if products else (None, None)
        plain = [(rows.left, at) for rows, at in zip(pieces, self._targets, strict=True) if rows.right is None]
        if left is not None and right is not None:
            left, right = self._merged(left, right, max(torch.finfo(part.dtype).eps for part, _ in products))
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

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        make = torch.empty if self._filled else torch.zeros
        shape, device = (self._most, self._count, parts[0].shape[1]), self._owners[0].device
        whole = make(shape, dtype=torch.float64, device=device)
        for part, (slot, at) in zip(parts, self._slots, strict=True):
            whole[slot, at] = part.to(whole.dtype)
        return whole

    def _merged(self, left: Tensor, right: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """One product of two with left factors that are multiples of each other but for rounding, ``eps``; as those of
        derivatives are in which an equation is linear.

            l rᵀ + c l qᵀ = l (r + c q)ᵀ
        """
        count = len(left)
        pairs = self._multiples
        if pairs is None:
            pairs = [(t, s) for t in reversed(range(1, count)) for s in range(t) if count <= _COMPARED]
        self._multiples = []
        for t, s in pairs:
            if all(t != other for other, _ in self._multiples):
                factors = _multiple(left[t], left[s], _PARALLEL * eps)
                if factors is not None:
                    right[s].addcmul_(factors, right[t])
                    self._multiples.append((t, s))
        gone = {t for t, _ in self._multiples}
        kept = [s for s in range(count) if s not in gone]
        at = slice(len(kept)) if kept == list(range(len(kept))) else kept  # without a copy, mostly
        return left[at], right[at]


def _multiple(of: Tensor, other: Tensor, tolerance: float) -> Tensor | None:
    """The factors (N, 1) that make rows of the others, (N, width); None where some are no multiples."""
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
