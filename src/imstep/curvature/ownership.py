"""Which row of a layer belongs to which residual, found by backward passes with coded cotangents.

Where residuals are computed independently of each other, every row of a layer's gradient is a multiple of the cotangent
of one residual. With the cotangent c_i = 2^(digit of i) in place of 1, the row grows by a power of two that spells the
digit: exactly, whatever the rounding. A row that is no multiple depends on several residuals.

The next Jacobian of the same model on the same data has the same owners, and saves the coded passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.islands import unseen
from imstep.curvature.course import KnownCourses
from imstep.curvature.derived import derived_nodes
from imstep.curvature.gathering import KnownPlaces, values_of
from imstep.curvature.partings import Parting, along_axes, partings, pieces
from imstep.curvature.squares import Residuals
from imstep.curvature.use import Use
from imstep.curvature.uses import Uses

_BITS = 6, 3
"""Of a digit; 2^63 times a gradient is a number in float32 as well, 2^7 times mostly in float16."""

_SINGLE = 1000
"""Values of functions at one point that are taken one by one, at most, and of four residuals one; our choice."""


@dataclass(frozen=True, eq=False)
class Group:
    """Residuals that are independent of each other, in some uses at least, with the rows that belong to them.

    Attributes:
        members: (N,), 1 for the residuals of the group, else 0.
        rows: of each use, (R, k): the addends of the residuals of the group; None where it is in other groups.
        owners: of each use, (R,): the residuals that the rows belong to; -1 for rows of zeros.
    """

    members: Tensor
    rows: list[Tensor | None]
    owners: list[Tensor | None]


class KnownOwners:
    """Remembers which row belongs to which residual, from one Jacobian to the next.

    Attributes:
        recorded: whether evaluations are to be recorded, for columns by forward products; None where that is ruled out.
        dependent: whether residuals were found to depend on each other.
        at_once: whether residuals share so many rows of layers that J written out costs less than their groups.
        warned: whether it was said that rows take many products.
        lone: whether the row of a batch of one is a row of one residual, as far as is known.
        sources: positions of parameters that no data meet, only weights that are made of them; None where that has not
            been looked at, none where it has not helped.
        courses: what was found of earlier evaluations.
        places: where rows go, given their owners.
    """

    def __init__(self) -> None:
        self.courses, self.places = KnownCourses(), KnownPlaces()
        self._groups: list[tuple[Tensor, list[Tensor | None]]] = []
        self._partly: list[list[int]] | None = None  # of each group the uses of which not all rows are owned
        self.recorded: bool | None = False
        self.dependent = self.at_once = self.warned = False
        self.lone = True
        self.sources: frozenset[int] | None = None

    def groups(self, residuals: Residuals, uses: Sequence[Use]) -> list[Group] | None:
        """The rows with the owners that are remembered; None where there are none for them.

        Cost: a backward pass a group.
        """
        groups = []
        if self._partly is None:
            owned = [values_of([(owner >= 0).all() for owner in _those(known)]) for _, known in self._groups]
            self._partly = [[at for at, all_ in enumerate(of) if not all_] for of in owned]
        for (members, known), partly in zip(self._groups, self._partly, strict=True):
            if len(members) != len(residuals.values) or len(known) != len(uses):
                return None
            owners = _those(known)
            rows = _spread(residuals, [use for use, of in zip(uses, known, strict=True) if of is not None], members)
            with unseen():
                if any(len(part) != len(owner) for part, owner in zip(rows, owners, strict=True)):
                    return None
                if any(bool(rows[at][owners[at] < 0].any()) for at in partly):
                    return None
            found = iter(rows)  # those that are zero now may well be owned
            groups.append(Group(members, [None if of is None else next(found) for of in known], known))
        return groups or None

    def remember(self, groups: Sequence[Group]) -> None:
        """Take up owners that were found; what is known of rows that are zero now stays."""
        found = [(group.members, list(group.owners)) for group in groups]
        if _shape(found) == _shape(self._groups):
            for (_, owners), (_, before) in zip(found, self._groups, strict=True):
                pairs = zip(owners, before, strict=True)
                owners[:] = [None if a is None or b is None else torch.where(a < 0, b, a) for a, b in pairs]
        self._groups, self._partly = found, None

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: of each group its members and the owners of each use's rows; whether to record;
        single rows; sources; courses.
        """
        state = {"groups": self._groups, "recorded": self.recorded, "dependent": self.dependent}
        state |= {"at_once": self.at_once, "lone": self.lone}
        sources = None if self.sources is None else sorted(self.sources)
        return {**state, "sources": sources, "courses": self.courses.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._groups, self._partly = [(members, list(owners)) for members, owners in state["groups"]], None
        self.recorded, self.dependent = state["recorded"], state["dependent"]
        self.at_once = state.get("at_once", False)  # older states have none of these
        self.lone = state.get("lone", False)  # their owners are for so many uses
        self.sources = None if state.get("sources") is None else frozenset(state["sources"])
        self.courses.load_state_dict(state.get("courses", {}))


def find_sources(residuals: Residuals, uses: Uses, parameters: Sequence[Tensor]) -> frozenset[int]:
    """The parameters, by position, that only weights seem to be made of: all residuals have the same rows of them.

    Cost: three backward passes, where there are any in question.
    """
    position, outputs = {id(p): at for at, p in enumerate(parameters)}, [o.z for o in residuals.outputs]
    told = derived_nodes(outputs, position)
    others = derived_nodes(outputs, position, frozenset(position.values()))
    sources = frozenset[int]().union(*(made for node, made in others.items() if node not in told))
    if not sources:
        return sources
    live: list[list[Tensor]] = [[] for _ in uses.known]
    for at in (0, len(residuals.values) // 2, len(residuals.values) - 1):
        one = torch.zeros_like(residuals.values)
        one[at] = 1
        for own, rows in zip(live, _spread(residuals, uses.known, one), strict=True):
            own.append(rows.any(1))
    with unseen():
        shared = values_of([torch.stack(own).all(0).any() for own in live])
    return sources - {use.parameter for use, by_all in zip(uses.known, shared, strict=True) if not by_all}


class DearGroupsError(Exception):
    """The residuals may be independent within groups, but those are more than are worth a look."""


def find_groups(residuals: Residuals, uses: Sequence[Use], most: float) -> list[Group] | None:
    """The rows of all uses with their owners; None where residuals are not independent of each other.

    Residuals that share rows, such as the components of a vector or two conditions at the same points, are taken in
    groups of which each is independent in itself. Where values are those of some functions at some points, as of an
    operator network, uses by function and uses by point are in groups of their own; also where each function is a term
    of the loss by itself. Values of all functions at one point are groups of one, for what is computed of the point.

    Args:
        most: groups of an output at most.

    Raises:
        DearGroupsError: there might be more.

    Cost: two backward passes a group for up to 64 residuals, three for up to 4,096, four for up to 262,144; in float16,
        whose range is short, one more for each factor of 8.
    """
    together = _groups(residuals, uses, [torch.ones_like(residuals.values)])
    if together is not None:
        return together
    groups: list[Group] = []
    left: list[Tensor] = []
    for start, z in sorted({o.start: o.z for o in residuals.outputs}.items(), key=lambda span: span[0]):
        known = partings(z)
        tried = (_groups(residuals, uses, _members(residuals, start, part)) for part in known if len(part) <= most)
        found = next(filter(None, tried), None)
        for entries in pieces(z) if found is None else ():
            ways: list[Parting] = [[entries], *along_axes(entries)]
            own = _by_use(residuals, uses, start, ways, most)
            if own is None and any(len(part) > most for part in (*known, *ways)):
                raise DearGroupsError
            if own is None:
                left.append(start + entries.reshape(-1))
            groups += own or []
        groups += found or []
    for size in dict.fromkeys(map(len, left)):  # functions one by one, at the same points
        same = [entries for entries in left if len(entries) == size]
        found = _by_use(residuals, uses, 0, along_axes(torch.stack(same)), most)
        if found is None and size > min(most, _SINGLE, len(residuals.values) / 4):
            return None
        for entries in same if found is None else ():  # values of functions at one point
            own = _by_use(residuals, uses, 0, [[entries], entries.split(1)], most)
            if own is None:
                return None
            groups += own
        groups += found or []
    return groups


def _members(residuals: Residuals, start: int, parting: Parting) -> Iterator[Tensor]:
    """The members, (N,) ones and zeros, of each group of an output."""
    for entries in parting:
        members = torch.zeros_like(residuals.values)
        members[start + entries.reshape(-1)] = 1
        yield members


def _by_use(
    residuals: Residuals, uses: Sequence[Use], start: int, partings: Sequence[Parting], most: float
) -> list[Group] | None:
    """The groups of an output, each use in those of a parting of its own; None where one is independent in none."""
    left, groups = list(range(len(uses))), []
    for parting in partings:
        if len(parting) > most:
            continue
        found, taken = [], left
        for members in _members(residuals, start, parting):
            owned = _owned(residuals, [uses[at] for at in taken], members)
            taken = [at for at, own in zip(taken, owned, strict=True) if own is not None]
            if not taken:
                break
            found.append((members, dict(zip(taken, filter(None, owned), strict=True))))
        for members, own in found if taken else ():
            rows = [own[at] if at in taken else (None, None) for at in range(len(uses))]
            groups.append(Group(members, [row for row, _ in rows], [owner for _, owner in rows]))
        left = [at for at in left if at not in taken]
        if not left:
            return groups
    return None


def _groups(residuals: Residuals, uses: Sequence[Use], parts: Iterable[Tensor]) -> list[Group] | None:
    """The groups of these members, (N,) ones and zeros each; None where one is not independent."""
    groups = []
    for members in parts:
        owned = [own for own in _owned(residuals, uses, members) if own is not None]
        if len(owned) < len(uses):
            return None
        groups.append(Group(members, [rows for rows, _ in owned], [owners for _, owners in owned]))
    return groups


def _those(owners: Sequence[Tensor | None]) -> list[Tensor]:
    return [owner for owner in owners if owner is not None]


def _owned(residuals: Residuals, uses: Sequence[Use], members: Tensor) -> list[tuple[Tensor, Tensor] | None]:
    """The rows of each use and their owners in the group of ``members``; None where a row belongs to several."""
    rows = _spread(residuals, uses, members)
    for bits in _BITS:
        try:
            owners = _owners(residuals, uses, members, rows, bits)
        except OverflowError:
            continue
        pairs = zip(rows, owners, strict=True)
        return [
            None if owner is None or bool((owner >= len(members)).any()) else (part, _of_live(part, owner))
            for part, owner in pairs
        ]
    return [None] * len(uses)


def _owners(
    residuals: Residuals, uses: Sequence[Use], members: Tensor, rows: Sequence[Tensor], bits: int
) -> list[Tensor | None]:
    """The residual that each of the rows (R, k) belongs to, of each use; None where one belongs to several.

    Raises:
        OverflowError: a coded gradient is beyond the range of its dtype.
    """
    count = len(members)
    index = torch.arange(count, device=members.device)
    owners: list[Tensor | None] = [torch.zeros(len(part), dtype=torch.long, device=members.device) for part in rows]
    for shift in range(0, max(count - 1, 1).bit_length(), bits):
        told = [at for at, owner in enumerate(owners) if owner is not None]
        coded = _spread(residuals, [uses[at] for at in told], torch.ldexp(members, (index >> shift) & (2**bits - 1)))
        for at, many in zip(told, coded, strict=True):
            if bool((rows[at].isfinite() & ~many.isfinite()).any()):
                raise OverflowError
            power, owner = _power_of_two(rows[at], many, 2**bits - 1), owners[at]
            owners[at] = None if power is None or owner is None else owner + (power << shift)
    return owners


def _spread(residuals: Residuals, uses: Sequence[Use], cotangent: Tensor) -> list[Tensor]:
    """The rows of every use, from one backward pass."""
    edges = list(dict.fromkeys(use.edge for use in uses))
    gradients = residuals.pull_back(cotangent, edges) if edges else ()
    at_edge = dict(zip(edges, gradients, strict=True))
    rows = []
    for use in uses:
        d = at_edge[use.edge]
        assert d is not None  # the edge was met on the way from the outputs
        rows.append(use.spread(d))
    return rows


def _of_live(rows: Tensor, owners: Tensor) -> Tensor:
    """The owners (R,), -1 for rows of zeros."""
    return torch.where(rows.any(1), owners, -1)


def _shape(groups: Sequence[tuple[Tensor, list[Tensor | None]]]) -> list[tuple[int, list[int]]]:
    """How many residuals there are, and how many rows of each use."""
    return [(len(members), [-1 if own is None else len(own) for own in owners]) for members, owners in groups]


def _power_of_two(one: Tensor, many: Tensor, largest: int) -> Tensor | None:
    """The k (R,), up to ``largest``, with many = 2^k one for each row; None where a row is no such multiple.

    0 for rows of zeros, and for rows that are not finite, which the gradient will show.
    """
    size, larger = one.abs().amax(1), many.abs().amax(1)
    told = (size > 0) & larger.isfinite()
    power = torch.where(told, larger / size, 1.0).log2().round_().clamp_(0, largest)
    error = torch.addcmul(many, one, torch.exp2(power)[:, None], value=-1).abs_().amax(1)
    return power.long() if bool(((error <= 1e-3 * larger) | ~larger.isfinite()).all()) else None
