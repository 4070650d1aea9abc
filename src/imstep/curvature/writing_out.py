"""Columns or rows of a Jacobian that no graph tells: all at once by forward products, or in blocks backward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.callers import users_level
from imstep.complexstep.errors import UnsupportedOperatorError
from imstep.complexstep.graph import leads_to
from imstep.complexstep.islands import unseen
from imstep.complexstep.pattern import patterns_of
from imstep.complexstep.tape import Tape, TapeChangedError
from imstep.curvature.closure import usable
from imstep.curvature.course import Course
from imstep.curvature.derived import Derived
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.gradient_rows import GradientRows, PlainRows
from imstep.curvature.hooks import HookWatch, mask_of
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector, TensorVector, as_reals
from imstep.curvature.products import ReplayedProducts
from imstep.curvature.recording import Looking
from imstep.curvature.squares import Residuals, require_residuals
from imstep.curvature.use import Rows

_SLACK = 1e3
"""Times the rounding of rows, root-mean-square: by so much two sums of the same rows, with factors of both signs, may
differ. Rounding of sums with one sign would grow as their length, in which few rows at the wrong place hide."""

_COARSE = 0.05
"""What that comes to at most, in dtypes of few digits."""

_GOLDEN = (5**0.5 - 1) / 2
"""The fractions of its multiples are spread evenly, and all differ."""

_SILVER = 2**0.5 - 1
"""The same, for signs."""

_MANY = 64
"""Products or passes from which a Jacobian is dear."""

_BLOCK = 2**22
"""Entries of rows that a block of backward passes makes at most; our choice."""


Owned = tuple[Rows, Tensor]
"""Addends to rows of J, and the residuals (R,) that they belong to; -1 for none."""


@dataclass(frozen=True, eq=False)
class Addends:
    """What rows of J were added up from.

    Attributes:
        pieces: for each parameter, and then for what is derived from some, the addends to each member of a stack.
        derived: what is computed from parameters alone.
        tensors: the parameters.
    """

    pieces: Sequence[dict[int, list[Owned]]]
    derived: Sequence[Derived]
    tensors: Sequence[Tensor]

    def size(self, at: int, factors: Tensor) -> float:
        """Of what was added up for a parameter, each row times its factor."""
        sizes = [] if not self.pieces[at] else [self._entries(at, factors)]
        for number, theta in enumerate(self.derived, len(self.tensors)):
            if at in theta.parameters and self.pieces[number]:
                entries = self._entries(number, factors)
                scattered = _signs(len(entries), entries.device) * entries
                sizes += [rows for to, rows in theta.pull_back(scattered[None], self.tensors) if to == at]
        return math.hypot(*(float(size.norm()) for size in sizes))

    def _entries(self, number: int, factors: Tensor) -> Tensor:
        """Of the addends to each entry, the root of the sum of squares."""
        own = self.pieces[number]
        return torch.cat([torch.stack([_squares(*one, factors) for one in own[e]]).sum(0) for e in sorted(own)]).sqrt()


def _squares(rows: Rows, owner: Tensor, factors: Tensor) -> Tensor:
    """The sum of the squares of addends, entry by entry, each times the factor of its residual."""
    left = rows.left.double().square() * (factors[owner] * (owner >= 0)).square()[:, None]
    return left.sum(0) if rows.right is None else (left.mT @ rows.right.double().square()).flatten()


def _signs(count: int, device: torch.device) -> Tensor:
    """Signs that come in no order."""
    index = torch.arange(count, dtype=torch.float64, device=device)
    return 1 - 2 * (_SILVER * index).frac().round()


@dataclass(frozen=True, eq=False)
class Check:
    """A combination of the rows of J by autograd, against which rows are checked.

    Factors that differ tell a row that belongs to another residual, or to several. Those of small rows are larger, by
    the root of their size, so that rows are told down to rounding beside rows that are much larger.

    Attributes:
        factors: (N,).
        exact: Jᵀ times them, by parameter.
        masks: by parameter, zeros for the entries of that which hooks of users have set to zero, None for none; None
            where there is none at all.
    """

    factors: Tensor
    exact: Sequence[Tensor | None]
    masks: Sequence[Tensor | None] | None = None

    @classmethod
    def of(
        cls, residuals: Residuals, tensors: Sequence[Tensor], parts: Sequence[GradientRows | None] = ()
    ) -> Check:
        """By a backward pass.

        Args:
            parts: the rows of each parameter, as far as they are known, for the sizes of factors.

        Raises:
            ValueError: the residuals depend on none of the tensors.
        """
        values = residuals.values
        with unseen():
            index = torch.arange(len(values), dtype=torch.float64, device=values.device)
            signs = _signs(len(values), values.device)
            factors = (signs * (1 + (_GOLDEN * index).frac()) * _weights(parts, values)).to(values.dtype)
        hooks = HookWatch(tensors)
        with hooks.watching():
            exact = usable(list(residuals.pull_back(factors, tensors)))
        masks = hooks.factors()
        for factor in masks or []:
            if factor is not None:
                mask_of(factor)
        return cls(factors, exact, masks)

    def wrong(self, parts: Sequence[GradientRows | None], addends: Addends | None = None) -> list[int]:
        """The parameters whose rows, times the factors, do not add up to what autograd says.

        Args:
            parts: the rows of each parameter.
            addends: what these were added up from, if known. Where it has cancelled, as in differences of values
                nearby, its size is the scale of rounding.
        """
        limit = lambda g: min(_SLACK * torch.finfo(g.dtype).eps, _COARSE)
        with unseen():
            known = [(at, g) for at, g in enumerate(self.exact) if g is not None]
            measured = [t for at, g in known for t in self._missed(parts[at], g)]
            values = torch.stack(measured).view(-1, 2).tolist() if measured else []
            # What is not finite is not wrong: the gradient will show it.
            pairs = zip(known, values, strict=True)
            suspects = [(at, g, missed) for (at, g), (missed, size) in pairs if missed > limit(g) * size]
            size_of = lambda at: 0.0 if addends is None else addends.size(at, self.factors.double())
            return [at for at, g, missed in suspects if missed > limit(g) * size_of(at)]

    def _missed(self, part: GradientRows | None, g: Tensor) -> tuple[Tensor, Tensor]:
        """How far the rows are from a gradient, and the size of what was added up."""
        exact = as_reals(g).double().reshape(-1)
        if part is None:
            return exact.norm(), exact.new_zeros(())
        factors = self.factors.double()
        return (exact - part.rmatvec(factors)).norm(), (factors.square() @ part.squared_norms.clamp(min=0)).sqrt()


def _weights(parts: Sequence[GradientRows | None], values: Tensor) -> Tensor:
    """One over the root of the norm of each row, (N,), up to a factor; 1 where nothing is known of it, or where it is
    rounding, as that of a difference that is zero. No more than tells rows of all sizes above that.
    """
    found = [part.squared_norms for part in parts if part is not None]
    norms = sum(found, torch.zeros(len(values), dtype=torch.float64, device=values.device))
    largest = norms.max() if len(norms) else norms.new_ones(())
    told = norms.isfinite() & largest.isfinite() & (norms > largest * (10 * torch.finfo(values.dtype).eps) ** 2)
    most = min(_SLACK, torch.finfo(values.dtype).max ** 0.25)
    return torch.where(told, (largest / norms) ** 0.25, 1.0).clamp(max=most)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation of a loss.

    Attributes:
        loss: 0-dim, with its graph.
        residuals: of it.
        tape: the derivative of the tensors that the residuals are made of; None where it was not recorded.
        course: how the residuals came about.
    """

    loss: Tensor
    residuals: Residuals
    tape: Tape | None
    course: Course

    @classmethod
    def of(cls, frozen: FrozenClosure, parameters: ParameterVector, known: KnownOwners) -> Evaluation:
        """The first on a batch, recorded where that is known to be wanted."""
        recorded = cls.recorded(frozen, parameters, known) if known.recorded else None
        if recorded is not None:
            return recorded
        recording = known.courses.recording(parameters.tensors)
        watch = frozen.watch(recording)
        try:
            with Looking(recording, watch.moved):
                loss = frozen.loss_with_graph(watch)
            with watch:
                residuals = require_residuals(loss, parameters.tensors)
            return cls(loss, residuals, None, Course(recording, loss, residuals.whole, known.courses))
        finally:
            recording.forget()

    @classmethod
    def recorded(cls, frozen: FrozenClosure, parameters: ParameterVector, known: KnownOwners) -> Evaluation | None:
        """One that is recorded; None where the closure cannot be."""
        tensors = parameters.tensors
        tape = Tape(patterns=patterns_of(tensors))
        recording = known.courses.recording(tensors)
        arithmetic = frozen.arithmetic(tape=tape, recording=recording)
        for p in tensors:
            arithmetic.attach(p, lent=True)
        try:
            with Looking(recording):
                loss = frozen.loss_with_graph(arithmetic)
            with frozen.watch(recording):
                residuals = require_residuals(loss, tensors)
            late = [o.z.grad_fn for o in residuals.outputs if arithmetic.reference(o.z) is None]
            if any(leads_to(node, tensors) for node in late):
                raise TapeChangedError("what is squared was computed after the loss, as r - r.mean() of r.var().")
            course = Course(recording, loss, residuals.whole, known.courses)
            with unseen():
                arithmetic.finish([o.z for o in residuals.outputs])
        except (UnsupportedOperatorError, TapeChangedError) as error:
            frozen.undo(error)
            known.recorded = None
            return None
        finally:
            recording.forget()
            for p in tensors:
                arithmetic.release(p)
        return cls(loss, residuals, tape, course)


def write_out(
    evaluation: Evaluation,
    positions: Sequence[int],
    frozen: FrozenClosure,
    parameters: ParameterVector,
    known: KnownOwners,
    check: Check | None,
) -> list[GradientRows]:
    """The rows of some parameters, by position: columns where they are no more than the rows."""
    if not positions or check is None:
        return []
    residuals, tensors = evaluation.residuals, [parameters.tensors[at] for at in positions]
    count, columns = len(residuals.values), sum(as_reals(p).numel() for p in tensors)
    if min(count, columns) > _MANY and not (known.at_once or known.warned):
        known.warned = True
        warnings.warn(
            f"{len(positions)} of {len(parameters.tensors)} parameters are used in ways that are not recognised; "
            f"their part of the Jacobian takes {min(count, columns)} products.",
            stacklevel=users_level(),
        )
    if columns <= count and known.recorded is not None:
        known.recorded = True
        recorded = evaluation if evaluation.tape is not None else Evaluation.recorded(frozen, parameters, known)
        if recorded is not None:
            parts = by_columns(recorded, positions, parameters)
            residuals.passes += columns
            if not Check(check.factors, [check.exact[at] for at in positions]).wrong(parts):
                return parts
            known.recorded = None  # something is out of the record's sight
    return [PlainRows(rows) for rows in in_blocks(residuals, tensors)]


@torch.no_grad()
def by_columns(evaluation: Evaluation, positions: Sequence[int], parameters: ParameterVector) -> list[GradientRows]:
    """The rows of some parameters from all of their columns, by one replay of the tape."""
    assert evaluation.tape is not None
    residuals, part = evaluation.residuals, parameters.part(positions)
    with unseen():  # no code of the user's runs, and each operator of a replay would pay for being seen
        outputs = TensorVector([(o.z.shape, o.z.dtype) for o in residuals.outputs], parameters.dtype, parameters.device)
        products = ReplayedProducts(evaluation.tape, outputs, parameters)
        block = products.block(range(len(residuals.outputs)), positions)
        made = block.several(torch.eye(part.size, dtype=parameters.dtype, device=parameters.device)).double()
        rows = torch.zeros(len(residuals.values), part.size, dtype=torch.float64, device=parameters.device)
        for o, piece in zip(residuals.outputs, made.split([o.z.numel() for o in residuals.outputs], 1), strict=True):
            rows[o.start : o.start + o.z.numel()] += piece.mT * o.factor.double().reshape(-1, 1)
        return [PlainRows(of) for of in rows.split(part.sizes, 1)]


def in_blocks(residuals: Residuals, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The rows of parameters by backward passes, as many at once as there is room for: (N, entries) each."""
    count, sizes = len(residuals.values), [as_reals(p).numel() for p in tensors]
    width = sum(sizes)
    rows = [torch.zeros(count, n, dtype=torch.float64, device=residuals.values.device) for n in sizes]
    at_once = max(1, min(count, _BLOCK // max(width, count)))
    unit = torch.zeros(at_once, count, dtype=residuals.values.dtype, device=residuals.values.device)
    for index in torch.arange(count, device=unit.device).split(at_once):
        block = unit[: len(index)].zero_()
        block[torch.arange(len(index), device=unit.device), index] = 1
        for whole, g in zip(rows, _pulled_back(residuals, block, tensors), strict=True):
            if g is not None:
                whole[index] = as_reals(g).reshape(len(index), -1).double()
    return rows


def _pulled_back(residuals: Residuals, block: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients (k, ...) of a block (k, N) of combinations."""
    try:
        return residuals.pull_back_block(block, tensors)
    except RuntimeError:  # a backward pass that vmap cannot take, of a custom function
        made: list[Any] = [residuals.pull_back(one, tensors) for one in block]
        return [None if row[0] is None else torch.stack(row) for row in zip(*made, strict=True)]
