"""The Jacobian of a loss's residuals and its Gram matrix, without a backward pass per residual."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from imstep.complexstep.islands import unseen
from imstep.complexstep.later import as_evaluated
from imstep.curvature.derived import Derived
from imstep.curvature.direct import entry_rows
from imstep.curvature.frozen import Closure, FrozenClosure
from imstep.curvature.gathering import KnownPlaces
from imstep.curvature.gradient_rows import Form, GradientRows, PlainRows, StackedRows
from imstep.curvature.ownership import DearGroupsError, Group, KnownOwners, find_groups, find_sources
from imstep.curvature.parameters import ParameterVector, as_reals
from imstep.curvature.squares import NoResidualsError
from imstep.curvature.uses import Rows, Use, find_uses
from imstep.curvature.writing_out import Addends, Check, Evaluation, write_out
from imstep.linalg import GramMatrix, RowMatrix, ScaledRows
from imstep.linalg.precision import coarsest_eps, full_precision

F64 = torch.float64
_CHUNK = 256
"""Rows of a Gram matrix at a time."""

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


class JacobianRows(RowMatrix):
    """A matrix J of N rows, one gradient each, kept parameter by parameter: shape (N, n), float64.

    Args:
        parts: the rows with respect to each parameter, in order; None where all are zero.
        sizes: entries of each parameter.
        count: N.
        device: of the rows.
    """

    def __init__(
        self, parts: Sequence[GradientRows | None], sizes: Sequence[int], count: int, device: torch.device
    ) -> None:
        super().__init__((count, sum(sizes)), F64, device)
        self._parts, self._sizes = list(parts), list(sizes)

    def matvec(self, vector: Tensor) -> Tensor:
        image = vector.new_zeros(self.shape[0])
        for part, piece in zip(self._parts, vector.split(self._sizes), strict=True):
            if part is not None:
                image += part.matvec(piece)
        return image

    def rmatvec(self, vector: Tensor) -> Tensor:
        pieces = zip(self._parts, self._sizes, strict=True)
        return torch.cat([vector.new_zeros(n) if part is None else part.rmatvec(vector) for part, n in pieces])

    def rows(self, index: Tensor) -> JacobianRows:
        """The rows at ``index`` (k,)."""
        parts = [None if part is None else part.select(index) for part in self._parts]
        return JacobianRows(parts, self._sizes, len(index), self.device)

    def squared_norm(self) -> float:
        sums = [part.squared_norms.sum() for part in self._parts if part is not None]
        return sum(torch.stack(sums).tolist()) if sums else 0.0

    def written_out(self) -> Tensor:
        empty = lambda n: torch.zeros(self.shape[0], n, dtype=F64, device=self.device)
        parts = zip(self._parts, self._sizes, strict=True)
        return torch.cat([empty(n) if part is None else part.written_out() for part, n in parts], 1)

    def in_units(self, units: Tensor) -> RowMatrix:
        """J D⁻¹ for D (n,) > 0; as compact as J where D has one entry for each parameter."""
        pieces = units.split(self._sizes)
        if not all(bool((piece == piece[0]).all()) for piece in pieces if len(piece)):
            return ScaledRows(self, units)
        return self._over([float(piece[0]) if len(piece) else 1.0 for piece in pieces])

    def times(self, factor: float) -> JacobianRows:
        """The rows times a factor > 0."""
        return self._over([1 / factor] * len(self._sizes))

    def _over(self, divisors: Sequence[float]) -> JacobianRows:
        pairs = zip(self._parts, divisors, strict=True)
        parts = [None if part is None else part.over(divisor) for part, divisor in pairs]
        return JacobianRows(parts, self._sizes, self.shape[0], self.device)

    @property
    def forms(self) -> list[Form | None]:
        """In which the rows of each parameter are sent; None where all are zero."""
        return [None if part is None else part.form for part in self._parts]

    def packed(self, form: Sequence[Form | None]) -> Tensor:
        pairs = [(part, of) for part, of in zip(self._parts, form, strict=True) if of is not None]
        zeros = lambda width: torch.zeros(self.shape[0], width, dtype=F64, device=self.device)
        return torch.cat([zeros(of.width) if part is None else part.packed(of) for part, of in pairs], 1)

    def unpacked(self, packed: Tensor, form: Sequence[Form | None]) -> JacobianRows:
        pieces = iter(packed.split([of.width for of in form if of is not None], 1))
        parts = [None if of is None else of.unpacked(next(pieces)) for of in form]
        return JacobianRows(parts, self._sizes, len(packed), self.device)

    def gram(self) -> Gram:
        """J Jᵀ, (N, N)."""
        return Gram(self, [part for part in self._parts if part is not None])


class Gram(GramMatrix):
    """J Jᵀ for rows J; what `J.gram()` builds.

    Args:
        rows: J.
        parts: its rows with respect to each parameter.
    """

    def __init__(self, rows: JacobianRows, parts: Sequence[GradientRows]) -> None:
        super().__init__(rows.shape[0], rows.dtype, rows.device)
        self._rows, self._parts = rows, parts
        self._whole: Tensor | None = None

    def matvec(self, vector: Tensor) -> Tensor:
        return self._rows.matvec(self._rows.rmatvec(vector))

    def matmat(self, block: Tensor) -> Tensor:
        """K V: by K itself, which is kept, where that takes fewer multiplications than J (Jᵀ V) does."""
        size, columns = block.shape
        counts = [part.multiplications for part in self._parts]
        image, entry = sum(of_image for of_image, _ in counts), sum(of_gram for _, of_gram in counts)
        if self._whole is None and 2 * image * columns < (entry / 2 + columns) * size:
            return super().matmat(block)
        return self.dense() @ block

    def diagonal(self) -> Tensor:
        none = torch.zeros(self.size, dtype=F64, device=self.device)
        return sum((part.squared_norms for part in self._parts), none)

    def entries(self, rows: slice | Tensor, columns: Tensor) -> Tensor:
        count = len(range(self.size)[rows]) if isinstance(rows, slice) else len(rows)
        block = torch.zeros(count, len(columns), dtype=F64, device=self.device)
        for part in self._parts:
            part.add_gram(block, rows, columns)
        return block

    def principal(self, index: Tensor) -> Tensor:
        return self._rows.rows(index).gram().dense()

    def dense(self) -> Tensor:
        """K itself, (N, N), computed once: the lower triangle, in chunks of rows, and its mirror image."""
        if self._whole is not None:
            return self._whole
        whole = torch.zeros(self.size, self.size, dtype=F64, device=self.device)
        for start in range(0, self.size, _CHUNK):
            end = min(start + _CHUNK, self.size)
            for part in self._parts:
                part.add_gram(whole[start:end, :end], slice(start, end), slice(0, end))
            whole[:start, start:end] = whole[start:end, :start].mT
            corner = whole[start:end, start:end]
            corner.copy_(corner.tril() + corner.tril(-1).mT)
        self._whole = whole
        return whole


class ResidualJacobian(JacobianRows):
    """J = ∂ρ/∂w of the residuals ρ of a loss f = ρᵀρ/2, at the parameters' values when it was built.

        g = Jᵀρ,   Gauss-Newton matrix = JᵀJ,   Gram matrix = JJᵀ

    Where the gradient of a layer's weight is a sum of few outer products per residual, J is kept as their factors, and
    JJᵀ takes N² (in + out) multiplications for a pair of uses of the weight instead of N² in · out. The factors are
    found in autograd's graph, so that a loss may take derivatives of the model with respect to its inputs.

    Args:
        closure: returns the loss, a sum of squares by sums, means and positive factors, of residuals that are computed
            independently of each other; it may also call ``zero_grad()`` and ``backward()``.
        params: a module or an iterable of parameters; those with ``requires_grad=False`` are left out.

    Attributes:
        loss: f(w), a 0-dim tensor.
        residuals: ρ, (N,), float64.
        terms: how many of them each term of the loss has, that is, each square that the closure writes, in order.
        rest: what the loss is more than ρᵀρ/2, where it adds constants to squares; None where it does not.
        evaluations: of the closure; 1, or 2 where only the first showed that columns are wanted.
        backward_passes: how many it took to build; a forward product counts as one.
        used: whether the residuals depend on each parameter.
        course: how the residuals came about.
        explicit: positions of parameters whose uses were not recognised, and whose part of J is written out.
        hooked: whether hooks set entries of gradients to zero.
        eps: rounding of the residuals, that of the coarsest dtype among loss, parameters and what is squared.

    Raises:
        NoResidualsError: the loss is no sum of squares; or the residuals depend on each other, as with batch
            normalisation, and J is too large to be written out.
        ValueError: the loss depends on none of the parameters.

    Cost: a forward pass; three to five backward passes. For the n' entries of ``explicit`` n' forward products at once
        by the complex step, or N backward passes in blocks, whichever are fewer. Arithmetic on rows is float64
        whatever the parameters' dtype, since JJᵀ has the square of J's condition.

    Source: our own.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> J = ResidualJacobian(lambda: model(x).square().sum() / 2, model)
        >>> J.gram().dense()
        tensor([[5., 6.],
                [6., 9.]], dtype=torch.float64)
    """

    def __init__(self, closure: Closure, params: nn.Module | Iterable[Tensor]) -> None:
        parameters = ParameterVector(params)
        frozen = FrozenClosure(closure, parameters)
        try:
            self._fill(frozen, parameters, KnownOwners())
        finally:
            frozen.leave(accepted=True)

    @property
    def gradient(self) -> Tensor:
        """Jᵀρ, (n,)."""
        return self.rmatvec(self.residuals)

    @classmethod
    def at(cls, frozen: FrozenClosure, parameters: ParameterVector, known: KnownOwners) -> ResidualJacobian:
        """From a closure that has not been evaluated on its batch yet.

        Args:
            known: what earlier Jacobians have found, which saves passes; taken up and completed.
        """
        self = cls.__new__(cls)
        self._fill(frozen, parameters, known)
        return self

    @full_precision
    @as_evaluated()
    def _fill(self, frozen: FrozenClosure, parameters: ParameterVector, known: KnownOwners) -> None:
        before = frozen.losses
        evaluation = Evaluation.of(frozen, parameters, known)
        residuals, tensors = evaluation.residuals, parameters.tensors
        parts, wrong, check = _parts(evaluation, tensors, known)
        for at, part in zip(wrong, write_out(evaluation, wrong, frozen, parameters, known, check), strict=True):
            parts[at] = part
        self.terms = residuals.sizes
        self.rest = float(residuals.whole[-1]) if len(residuals.whole) > len(residuals.values) else None
        self.loss, self.residuals, self.explicit = evaluation.loss.detach(), residuals.values.double(), tuple(wrong)
        self.backward_passes, self.evaluations = residuals.passes, frozen.losses - before
        self.course = evaluation.course
        self.eps = coarsest_eps([evaluation.loss, *tensors, *(o.z for o in residuals.outputs)])
        self.used = [part is not None for part in parts]
        frozen.user.take_hooks(None if check is None else check.masks)
        self.hooked = frozen.hook_factors is not None
        super().__init__(parts, parameters.sizes, len(residuals.values), parameters.device)

    def weighted(self, weights: Tensor) -> ResidualJacobian:
        """That of the loss ½ Σ weights_i ρ_i², weights (N,) > 0; kept as compactly, without an evaluation."""
        factors = weights.sqrt()
        other = copy.copy(self)
        other._parts = [None if part is None else part.over(1 / factors[:, None]) for part in self._parts]
        other.residuals = factors * self.residuals
        other.loss = (other.residuals.square().sum() / 2).to(self.loss)
        return other


def _parts(
    evaluation: Evaluation, tensors: Sequence[Tensor], known: KnownOwners
) -> tuple[list[GradientRows | None], list[int], Check | None]:
    """The rows for each parameter, the positions of those whose rows are not known, and what they were checked by."""
    residuals, course = evaluation.residuals, evaluation.course
    none: list[GradientRows | None] = [None] * len(tensors)
    if not len(residuals.values):
        return none, [], None
    if known.dependent or known.at_once:
        return none, list(range(len(tensors))), Check.of(residuals, tensors)
    uses = find_uses([o.z for o in residuals.outputs], tensors, known.lone, known.sources or frozenset())
    told = [use for use in uses.known if use.parameter not in uses.unknown]
    entries = [one for one in uses.direct if one.parameter not in uses.unknown]
    direct = [one.addends(residuals.outputs, tensors[one.parameter]) for one in entries]
    gathered = lambda groups: _gathered(groups, told, direct, uses.derived, tensors, known.places)
    groups = known.groups(residuals, told)
    if groups is not None:
        parts, addends = gathered(groups)
        if not uses.unknown and course.has_known_rows and not any(p._backward_hooks for p in tensors):
            return parts, [], None
        check = Check.of(residuals, tensors, parts)
        if uses.unknown.issuperset(check.wrong(parts, addends)):
            if not uses.unknown:
                course.know_rows()
            return parts, sorted(uses.unknown), check
    count, columns = len(residuals.values), sum(as_reals(p).numel() for p in tensors)
    shorter = min(count, columns)
    # A group works on the rows of every use, one after the other; columns, or rows, are made all at once.
    dear = _AT_ONCE * shorter * max(1, count / _LONG) / max(len(told), 1)
    if shorter > AFFORDABLE and count * columns > _ROOM:
        dear = math.inf
    try:
        groups, too_many = find_groups(residuals, told, dear), False
    except DearGroupsError:
        groups, too_many = None, True
    if uses.lone and (groups is None or len(groups) > _FEW):
        known.lone = False
        return _parts(evaluation, tensors, known)
    if known.sources is None and (groups is None or uses.unknown):
        known.sources = find_sources(residuals, uses, tensors)
        if known.sources:
            return _parts(evaluation, tensors, known)
    if known.sources and groups is None:
        known.sources = frozenset()
        return _parts(evaluation, tensors, known)
    if too_many:
        known.at_once = True
        return none, list(range(len(tensors))), Check.of(residuals, tensors)
    if groups is None:
        if shorter > AFFORDABLE:
            raise NoResidualsError(
                "the residuals depend on each other: a row of a layer belongs to several of them, as with batch "
                f"normalisation or attention across the batch; and J is too large to be written out ({shorter} rows "
                f"or columns; up to {AFFORDABLE} are). Put normalisation into eval mode, or use an optimizer "
                "that needs no residuals."
            )
        known.dependent = True
        return none, list(range(len(tensors))), Check.of(residuals, tensors)
    parts, addends = gathered(groups)
    check = Check.of(residuals, tensors, parts)
    wrong = uses.unknown.union(check.wrong(parts, addends))
    if known.sources and wrong > uses.unknown:
        known.sources = frozenset()
        return _parts(evaluation, tensors, known)
    known.remember(groups)
    return parts, sorted(wrong), check


def _gathered(
    groups: Sequence[Group],
    uses: Sequence[Use],
    direct: Sequence[tuple[int, int, Tensor]],
    derived: Sequence[Derived],
    tensors: Sequence[Tensor],
    places: KnownPlaces,
) -> tuple[list[GradientRows | None], Addends]:
    """The rows for each parameter, None where it has none; and what they were added up from."""
    sizes = [*(as_reals(p).numel() for p in tensors), *(theta.entries for theta in derived)]
    pieces: list[dict[int, list[tuple[Rows, Tensor]]]] = [{} for _ in sizes]
    members = [1] * len(sizes)
    for group in groups:
        for use, rows, owner in zip(uses, group.rows, group.owners, strict=True):
            if rows is None or owner is None:
                continue
            e, members[use.parameter] = use.member
            pieces[use.parameter].setdefault(e, []).append((use.rows(rows), owner))
    for at, start, entries in direct:
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
