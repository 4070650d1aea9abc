"""The rows of a Jacobian that are known without a backward pass for each residual, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from imstep.complexstep.islands import unseen
from imstep.curvature.derived import Derived
from imstep.curvature.direct import entry_rows
from imstep.curvature.gathering import KnownPlaces
from imstep.curvature.gradient_rows import GradientRows, PlainRows, StackedRows
from imstep.curvature.ownership import DearGroupsError, Group, KnownOwners, find_groups, find_sources
from imstep.curvature.parameters import as_reals
from imstep.curvature.squares import NoResidualsError
from imstep.curvature.uses import Rows, find_uses
from imstep.curvature.writing_out import Addends, Check, Evaluation

AFFORDABLE = 1000
"""Rows or columns, whichever are fewer, up to which J is written out where residuals depend on each other."""

_AT_ONCE = 4
"""Uses of parameters, over all groups, for a column or row: with more, J written out is cheaper. Our choice: for a
system of 108 parameters over 48 times, columns take 0.06 s and groups 2.4 s a step; for a Fourier neural operator of
3,745 parameters and 1,024 residuals, rows take 1.9 s and groups more than a minute."""

_LONG = 1000
"""Residuals from which a pass takes the longer, the more there are."""

_ROOM = 2**27
"""Entries of J that are written out at most, in place of groups."""

_FEW = 16
"""Groups of residuals up to which the row of a batch of one is taken for one residual's; our choice."""

Found = tuple[list[GradientRows | None], list[int], Check | None]
"""The rows for each parameter, the positions of those whose rows are not known, and what they were checked by."""


def known_rows(evaluation: Evaluation, tensors: Sequence[Tensor], known: KnownOwners) -> Found:
    """What is known of the rows of each parameter; to be written out for the others.

    Args:
        known: what earlier Jacobians have found; completed.

    Raises:
        NoResidualsError: residuals depend on each other, and J is too large to be written out.
    """
    if not len(evaluation.residuals.values):
        return [None] * len(tensors), [], None
    while not (known.dependent or known.at_once):
        search = _Search(evaluation, tensors, known)
        found = search.remembered() or search.anew()
        if found is not None:
            return found
    return [None] * len(tensors), list(range(len(tensors))), Check.of(evaluation.residuals, tensors)


class _Search:
    """For rows by the uses of parameters, as far as is known which of them matter."""

    def __init__(self, evaluation: Evaluation, tensors: Sequence[Tensor], known: KnownOwners) -> None:
        self._residuals, self._course = evaluation.residuals, evaluation.course
        self._tensors, self._known = tensors, known
        outputs = self._residuals.outputs
        self._uses = uses = find_uses([o.z for o in outputs], tensors, known.lone, known.sources or frozenset())
        self._told = [use for use in uses.known if use.parameter not in uses.unknown]
        entries = [one for one in uses.direct if one.parameter not in uses.unknown]
        self._direct = [one.addends(outputs, tensors[one.parameter]) for one in entries]

    def remembered(self) -> Found | None:
        """By the groups of earlier Jacobians; None where there are none, or none that are right."""
        groups, unknown = self._known.groups(self._residuals, self._told), self._uses.unknown
        if groups is None:
            return None
        parts, addends = self._gathered(groups)
        if not unknown and self._course.has_known_rows and not any(p._backward_hooks for p in self._tensors):
            return parts, [], None
        check = Check.of(self._residuals, self._tensors, parts)
        if not unknown.issuperset(check.wrong(parts, addends)):
            return None
        if not unknown:
            self._course.know_rows()
        return parts, sorted(unknown), check

    def anew(self) -> Found | None:
        """By groups that are looked for; None where uses are to be looked at in another way, or none will do."""
        known, unknown = self._known, self._uses.unknown
        try:
            groups = find_groups(self._residuals, self._told, self._dear)
        except DearGroupsError:
            known.at_once = not self._otherwise(None)
            return None
        if self._otherwise(groups):
            return None
        if groups is None:
            self._check_affordable()
            known.dependent = True
            return None
        parts, addends = self._gathered(groups)
        check = Check.of(self._residuals, self._tensors, parts)
        wrong = unknown.union(check.wrong(parts, addends))
        if known.sources and wrong > unknown:
            known.sources = frozenset()
            return None
        known.remember(groups)
        return parts, sorted(wrong), check

    def _otherwise(self, groups: Sequence[Group] | None) -> bool:
        """Whether there is another way to look at uses than the one that has led to these groups; then it is next."""
        known, uses = self._known, self._uses
        if uses.lone and (groups is None or len(groups) > _FEW):
            known.lone = False
            return True
        if known.sources is None and (groups is None or uses.unknown):
            known.sources = find_sources(self._residuals, uses, self._tensors)
            return bool(known.sources)
        if known.sources and groups is None:
            known.sources = frozenset()
            return True
        return False

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self._residuals.values), sum(as_reals(p).numel() for p in self._tensors)

    @property
    def _dear(self) -> float:
        """From how many groups on J written out is cheaper.

        A group works on the rows of every use, one after the other; columns, or rows, are made all at once.
        """
        count, columns = self._shape
        shorter = min(count, columns)
        if shorter > AFFORDABLE and count * columns > _ROOM:
            return math.inf
        return _AT_ONCE * shorter * max(1, count / _LONG) / max(len(self._told), 1)

    def _check_affordable(self) -> None:
        shorter = min(self._shape)
        if shorter > AFFORDABLE:
            raise NoResidualsError(
                "the residuals depend on each other: a row of a layer belongs to several of them, as with batch "
                f"normalisation or attention across the batch; and J is too large to be written out ({shorter} rows "
                f"or columns; up to {AFFORDABLE} are). Put normalisation into eval mode, or use an optimizer "
                "that needs no residuals."
            )

    def _gathered(self, groups: Sequence[Group]) -> tuple[list[GradientRows | None], Addends]:
        """The rows for each parameter, None where it has none; and what they were added up from."""
        tensors, places, derived = self._tensors, self._known.places, self._uses.derived
        sizes = [*(as_reals(p).numel() for p in tensors), *(theta.entries for theta in derived)]
        pieces: list[dict[int, list[tuple[Rows, Tensor]]]] = [{} for _ in sizes]
        members = [1] * len(sizes)
        for group in groups:
            for use, rows, owner in zip(self._told, group.rows, group.owners, strict=True):
                if rows is None or owner is None:
                    continue
                e, members[use.parameter] = use.member
                pieces[use.parameter].setdefault(e, []).append((use.rows(rows), owner))
        for at, start, entries in self._direct:
            for e, part in enumerate(entries.chunk(members[at])):
                own, first = pieces[at].setdefault(e, []), start + e * len(part)
                widths = [rows.left.shape[1] for rows, _ in own if rows.right is not None]
                owner = places.run(first, first + len(part), part.device)
                own.append((entry_rows(part, widths[0] if widths else None), owner))
        with unseen():  # what follows is nothing that a checkpoint runs again
            parts = _summed(pieces, members, sizes, len(groups[0].members), derived, tensors, places)
        return parts, Addends(pieces, derived, tensors)


def _summed(
    pieces: Sequence[dict[int, list[tuple[Rows, Tensor]]]],
    members: Sequence[int],
    sizes: Sequence[int],
    count: int,
    derived: Sequence[Derived],
    tensors: Sequence[Tensor],
    places: KnownPlaces,
) -> list[GradientRows | None]:
    """The rows for each parameter from what its uses add, those of what is derived from it included."""
    parts: list[GradientRows | None] = []
    for at, (own, of, size) in enumerate(zip(pieces, members, sizes, strict=True)):
        gathered = [places.gather((at, e), own[e], count, size // of) for e in range(of)] if own else []
        parts.append(None if not own else gathered[0] if of == 1 else StackedRows(gathered, size // of))
    for theta, part in zip(derived, parts[len(tensors) :], strict=True):
        for at, rows in theta.pull_back(part.written_out(), tensors) if part is not None else ():
            before = parts[at]
            parts[at] = PlainRows(rows if before is None else before.written_out() + rows)
    return parts[: len(tensors)]
