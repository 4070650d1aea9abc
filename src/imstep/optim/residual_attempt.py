"""One step of least squares: linearise, correct, judge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.residual_jacobian import ResidualJacobian
from imstep.curvature.shared import SharedBatch
from imstep.curvature.shared_jacobian import SharedJacobian
from imstep.curvature.staleness import StaleLossError
from imstep.linalg import DampedLeastSquares
from imstep.linalg.dots import norm_in_range
from imstep.optim.balancing import Balancing, Weighted
from imstep.optim.box import Box
from imstep.optim.chord import ChordStep, chord_iterations, decrease_of, no_relief
from imstep.optim.ground import Ground, ground_at
from imstep.optim.memory import Memory
from imstep.optim.pace import Pace
from imstep.optim.recall import new_points
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.residual_settings import Settings
from imstep.optim.residual_trials import ResidualTrials
from imstep.optim.shared_trials import SharedTrials
from imstep.optim.step_attempt import StepAttempt

_FINE = 10.0
"""Times the rounding of a decrease: a promise below that is not worth comparing with it."""

_LOWER = 0.9
"""Of a gradient: what is no more than this is lower, rounding or not."""

_SOON = 2
"""Trials of a step after which λ grows ever faster."""

_ENOUGH = 0.7
"""Of the decrease that a linear function would have promised: corrections go on where a step has come to less."""

MOST_DAMPING = 1e100
"""λ at which a step that is still too long will not get shorter."""

_PATIENCE = 3
"""Trials in a step whose decrease is rounding and whose gradient is no lower."""


class ResidualAttempt(StepAttempt):
    """One step of :class:`LeastSquares`.

    Args:
        settings: what the user chose.
        memory, parameters, frozen: see :class:`StepAttempt`.
        owners: what earlier Jacobians, of this process's residuals, have found; completed.
        box: bounds on the parameters; None for none.
    """

    _frozen: FrozenClosure | SharedBatch

    def __init__(
        self,
        settings: Settings,
        memory: Memory,
        parameters: ParameterVector,
        frozen: FrozenClosure | SharedBatch,
        owners: KnownOwners,
        box: Box | None,
        pace: Pace | None = None,
    ) -> None:
        super().__init__(memory, parameters, frozen, pace)
        self._settings, self._owners, self._box = settings, owners, box
        self._loss: Tensor
        self._gradient: Tensor
        self._trials: ResidualTrials | SharedTrials
        self._weighted: Weighted | None = None  # where terms are balanced
        self._recall = settings.recall  # None where the points are not known to be new
        self._earlier: Tensor | None = None  # rows of earlier Jacobians, (m, n)

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        return self._loss, self._gradient

    def run(self) -> tuple[StepRecord, Memory]:
        record = self._started(self._linearise)
        memory, jacobian = self._memory, self._jacobian
        if not record.finite:
            return self._not_finite(record)
        memory = memory.meet(record.gradient_norm)
        if memory.at_rest(record.gradient_norm, self._settings.tolerance):
            record = replace(record, cost=record.cost + Cost(linearisations=1))
            return self._stationary(record, memory, self._frozen.linearise())
        if self._settings.balance is not None:
            record, memory = self._balance(record, memory, self._settings.balance)
            jacobian = self._jacobian
            if memory.at_rest(norm_in_range(self._free(self._judged)), self._settings.tolerance):
                self._keep = True
                return replace(record, outcome=StepOutcome.CONVERGED), memory
        where = self._parameters, self._settings, memory, self._box
        if not new_points(record.loss, memory.loss):
            self._recall = None
        self._earlier = None if self._recall is None else memory.earlier
        eps = jacobian.eps
        if self._earlier is None:
            ground, memory = ground_at(jacobian, jacobian.residuals, eps, self._penalty, *where)
        else:
            residuals = torch.cat([jacobian.residuals, jacobian.residuals.new_zeros(len(self._earlier))])
            ground, memory = ground_at(jacobian.above(self._earlier), residuals, eps, self._penalty, *where)
        record = replace(record, factorisation=ground.factorised.kind, rank=ground.factorised.rank)
        return self._search(record, memory, ground)

    def _linearise(self) -> StepRecord:
        """Residuals, Jacobian and gradient."""
        jacobian: ResidualJacobian | SharedJacobian
        if isinstance(self._frozen, SharedBatch):
            jacobian = SharedJacobian.at(self._frozen, self._parameters, self._owners)
            self._trials = SharedTrials(self._frozen, self._parameters, self._snapshot, jacobian)
        else:
            jacobian = ResidualJacobian.at(self._frozen, self._parameters, self._owners)
            if self._memory.steps == 0:
                _check_range(jacobian)
            self._trials = ResidualTrials(self._frozen, self._parameters, self._snapshot, jacobian)
        self._jacobian = jacobian
        self._loss, self._residuals = jacobian.loss, jacobian.residuals
        self._gradient = self._judged = jacobian.gradient.to(self._parameters.dtype)
        self._penalty = self._frozen.settle_penalty(jacobian.used)
        if self._penalty is not None:
            w = self._parameters.get()
            self._loss = jacobian.loss + self._penalty.value(w)
            self._gradient = self._judged = self._gradient + self._penalty.factors * w
        record = self._opened(Cost(losses=jacobian.evaluations, jacobian_passes=jacobian.backward_passes))
        return replace(record, gradient_norm=norm_in_range(self._free(self._gradient)))

    def _balance(self, record: StepRecord, memory: Memory, rule: Balancing) -> tuple[StepRecord, Memory]:
        """Weights for the terms of the loss; what is linearised has them from here on."""
        assert isinstance(self._jacobian, ResidualJacobian)  # refused over processes
        weights = rule.weights(self._jacobian, memory.weights)
        self._weighted = weighted = Weighted(weights, self._jacobian, self._settings.most_corrections + 1)
        self._jacobian = jacobian = weighted.jacobian
        self._residuals = jacobian.residuals
        self._judged = (jacobian.T @ jacobian.residuals).to(self._parameters.dtype)
        if self._penalty is not None:
            self._judged = self._judged + self._penalty.factors * self._parameters.get()
        loss = float(jacobian.loss) + record.penalty
        record = replace(record, weights=tuple(weights.tolist()), weighted_loss=loss, new_weighted_loss=loss)
        return record, replace(memory, weights=weights)

    # --- trials -------------------------------------------------------------------------------------------------

    def _search(self, record: StepRecord, memory: Memory, ground: Ground) -> tuple[StepRecord, Memory]:
        """Try one λ after the other until a step is accepted."""
        rule, settings, residuals = self._settings.damping, self._settings, ground.residuals
        damping, patience, promised, shifted = memory.damping, _PATIENCE, False, residuals
        shift = None if memory.last_move is None else settings.momentum * memory.last_move
        if shift is not None:
            shifted = self._residuals_at(shift)
            if len(shifted) != len(residuals):
                shift, shifted = None, residuals
        place = lambda u: ground.step(u) if shift is None else ground.step(u) + shift
        for failures in range(settings.max_trials):
            reduced = ground.around(shift)
            damping = self._reaching(reduced, ground.scale, shifted, damping, place)
            step = chord_iterations(
                reduced,
                residuals,
                shifted,
                damping * ground.scale,
                lambda u: self._residuals_at(place(u)),
                relief=no_relief if self._penalty is None else lambda u: self._relief(place(u)),
                limit=rule.limit,
                max_iterations=settings.corrections,
                most=settings.most_corrections,
                enough=_ENOUGH,
                rounding=ground.rounding,
            )
            record = replace(record, iterations=step.iterations, damping=damping * ground.scale)
            there = place(step.coordinates)
            fine = 0 < step.promise <= _FINE * ground.rounding
            if self._stays(step, ground, there, record.damping, fine):
                share, left = self._share_of(step, there, residuals)
                if left >= 0 or (fine and left >= -ground.rounding):
                    image = step.image if shift is None else step.image + ground.jacobian @ shift
                    memory = replace(memory, damping=rule.after(damping, step.ratio, again=failures > 0))
                    return self._accept(record, memory, step, residuals, there, image, share, left)
                step = replace(step, ratio=math.inf)
            patience -= fine
            if patience == 0:
                break
            promised |= not fine and step.promise > 0
            # λ may be off by many orders of magnitude, as where steps have become long on the way out of a saddle.
            damping = rule.again(damping, step.ratio) * 2.0 ** max(failures - _SOON, 0)
            shift, shifted = None, residuals
        if promised and not self._trials.follows:
            raise StaleLossError(
                "the loss has a derivative, but at no trial point was it another than at the start: it does not follow "
                "the parameters. Look for a result that is kept from an earlier call, for detach() or .data, and for "
                "rounding, and compute all that depends on the parameters anew inside the closure."
            )
        spent = self._trials.spent
        record = replace(record, outcome=StepOutcome.REJECTED, trials=spent.losses, cost=record.cost + spent)
        # Not the last λ tried: where rounding is what fails steps, it says nothing of the next batch.
        return record, replace(memory, damping=rule.again(memory.damping, math.inf), column_norms=None)

    def _stays(self, step: ChordStep, ground: Ground, there: Tensor, damping: float, fine: bool) -> bool:
        """Whether a step is good enough. Where its decrease is rounding, ``fine``, the gradient decides."""
        rule = self._settings.damping
        decrease = math.inf if fine and step.decrease >= -ground.rounding else step.decrease
        if not rule.accepts(step.ratio, decrease, step.promise) or step.length > ground.reach:
            return False
        if not fine:
            return self._trials.finite_at(there)
        gradient = self._trials.gradient_at(there, self._weighted)
        if self._penalty is not None:
            gradient = gradient + self._penalty.factors * self._parameters.get()
        before, after = (self._free(g) for g in (self._judged, gradient))
        return ground.size(after, damping) <= _LOWER * ground.size(before, damping)

    def _share_of(self, step: ChordStep, there: Tensor, residuals: Tensor) -> tuple[Tensor, float]:
        """What is taken of a step d = ``there``, and by how much that lowers the loss; leaves the parameters there."""
        share = self._pace.share(there)
        excess = float(share.norm()) / self._pace.longest
        if self._pace.whole and excess <= 1:
            return share, step.decrease
        share = share / excess if excess > 1 else share
        return share, self._decrease_at(share, residuals)

    def _accept(
        self,
        record: StepRecord,
        memory: Memory,
        step: ChordStep,
        residuals: Tensor,
        there: Tensor,
        image: Tensor,
        share: Tensor,
        left: float,
    ) -> tuple[StepRecord, Memory]:
        """The record of a step d = ``there``, given what is taken of it and by how much that lowers the loss."""
        self._keep = True
        count = len(self._residuals)  # without the rows of earlier steps
        residuals, image = residuals[:count], image[:count]
        decrease, left = step.decrease + self._held(there), left + self._held(share)
        slope, curvature = self._of_penalty(there)
        slope, curvature = slope + float(residuals @ image), curvature + float(image @ image)
        predicted = -slope - curvature / 2
        record = replace(
            record,
            new_loss=record.loss - (left if self._weighted is None else self._plain_decrease(share)),
            new_weighted_loss=record.weighted_loss - left,
            trials=self._trials.spent.losses,
            step_length=1.0,
            direction_norm=float(there.norm()),
            step_norm=float(share.norm()),
            slope=slope,
            curvature=curvature,
            predicted_decrease=predicted,
            actual_decrease=decrease,
            rho=decrease / predicted if predicted > 0 else math.nan,
            taylor_error=predicted - decrease,
            cost=record.cost + self._trials.spent,
        )
        last_move = share if self._settings.momentum > 0 else None
        earlier = None if self._recall is None else self._recall.after(self._jacobian, self._earlier)
        return record, replace(memory, loss=record.new_loss, last_move=last_move, earlier=earlier)

    def _reaching(
        self,
        reduced: DampedLeastSquares,
        scale: float,
        residuals: Tensor,
        damping: float,
        place: Callable[[Tensor], Tensor],
    ) -> float:
        """The least of growing λ whose linear step is no longer than steps may be."""
        if math.isinf(self._pace.longest) or self._pace.lr == 0:
            return damping
        longest, none = self._pace.longest / self._pace.lr, residuals.new_zeros(reduced.rank)
        while damping * scale < MOST_DAMPING:
            length = float(place(reduced.solve(residuals, none, damping * scale)).norm())
            if not length > longest:
                break
            damping *= max(length / longest, 2.0)  # in the end steps are as long as 1/λ
        return damping

    def _decrease_at(self, step: Tensor, residuals: Tensor) -> float:
        """By how much a step lowers the loss; leaves the parameters there."""
        if not bool(step.any()):
            self._parameters.restore(self._snapshot)
            return 0.0
        decrease = decrease_of(residuals, self._residuals_at(step)) + self._relief(step)
        return decrease if math.isfinite(decrease) else -math.inf

    def _plain_decrease(self, step: Tensor) -> float:
        """By how much a step lowers the loss without weights."""
        assert self._weighted is not None
        return self._weighted.plain_decrease(step) + self._relief(step)

    def _held(self, step: Tensor) -> float:
        """What a step costs at the points of earlier ones."""
        return 0.0 if self._earlier is None else float((self._earlier @ step.double()).square().sum()) / 2

    def _relief(self, step: Tensor) -> float:
        """By how much a step lowers the penalty."""
        slope, curvature = self._of_penalty(step)
        return -slope - curvature / 2

    def _of_penalty(self, step: Tensor) -> tuple[float, float]:
        """The penalty's slope and curvature along a step d: λwᵀd and λdᵀd."""
        if self._penalty is None:
            return 0.0, 0.0
        w, d = self._parameters.flatten(self._snapshot).double(), step.double()
        weighted = self._penalty.factors * d
        return float(w @ weighted), float(d @ weighted)

    # --- evaluations --------------------------------------------------------------------------------------------

    def _residuals_at(self, step: Tensor) -> Tensor:
        """ρ(w + d), (N,), and what changes at the points of earlier steps."""
        own = self._trials.residuals_at(step)
        own = own if self._weighted is None else self._weighted.residuals(step, own)
        return own if self._earlier is None else torch.cat([own, self._earlier @ step.double()])

    def _free(self, gradient: Tensor) -> Tensor:
        """The gradient without the entries that bounds hold back."""
        return gradient if self._box is None else self._box.free(gradient, self._parameters.get())


def _check_range(jacobian: ResidualJacobian) -> None:
    """Raise where residuals that a fit begins with have squares too small for the loss, which has no gradient then."""
    dtype, largest = jacobian.loss.dtype, float(jacobian.residuals.abs().max()) if len(jacobian.residuals) else 0.0
    if 0 < largest * math.sqrt(len(jacobian.residuals)) < math.sqrt(torch.finfo(dtype).tiny):
        raise ValueError(
            f"squares of residuals of {largest:.0e} leave the range of {dtype}, so that the loss has no gradient. "
            "Divide the residuals by a constant of their size, or use float64."
        )
