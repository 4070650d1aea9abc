"""One step of least squares: linearise, correct, judge."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imstep.complexstep.later import later_grad
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.residual_jacobian import ResidualJacobian
from imstep.curvature.squares import require_residuals
from imstep.curvature.staleness import StaleLossError, check_fresh, nodes_of
from imstep.globalization import ContractionDamping
from imstep.linalg import BoxLeastSquares, Factorisation, RowMatrix, ScaledRows, StepSpace
from imstep.optim.box import Box
from imstep.optim.chord import ChordStep, chord_iterations
from imstep.optim.evaluable import outside_the_domain
from imstep.optim.memory import Memory
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.scaling import Scaling
from imstep.optim.step_attempt import StepAttempt

LEAST_SHARE = 1e-2
"""Of the trace of JJᵀ that is always taken account of."""

_ROUNDING = 10.0
"""Times the rounding of residuals: by so much losses may be wrong."""

_FINE = 10.0
"""Times the rounding of a decrease: a promise below that is not worth comparing with it."""

_LOWER = 0.9
"""Of a gradient: what is no more than this is lower, rounding or not."""

_SOON = 2
"""Trials of a step after which λ grows ever faster."""

_PATIENCE = 3
"""Trials in a step whose decrease is rounding and whose gradient is no lower."""


@dataclass(frozen=True)
class Settings:
    """What a user chooses: see :class:`LeastSquares`."""

    damping: ContractionDamping
    factorisation: Factorisation
    scaling: Scaling
    corrections: int
    share: float
    momentum: float
    tolerance: float
    max_trials: int

    def __post_init__(self) -> None:
        for name, kind in (("damping", ContractionDamping), ("factorisation", Factorisation), ("scaling", Scaling)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}.")
        if self.corrections < 1 or self.max_trials < 1:
            raise ValueError(
                f"corrections and max_trials are at least 1, got {self.corrections} and {self.max_trials}."
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is at least 0 and less than 1, got {self.momentum}.")
        if not (0 <= self.share < math.inf and self.tolerance >= 0):
            raise ValueError(f"share and tolerance are at least 0, got {self.share} and {self.tolerance}.")


@dataclass(frozen=True, eq=False)
class _Ground:
    """What a step stands on: the linearisation at w.

    Attributes:
        jacobian: J at w, with ρ.
        units: D (n,), in which entries of a step are measured; None for 1.
        space: damped least squares with J D⁻¹.
        scale: λ is a multiple of it.
        rounding: of a decrease of the loss.
        reach: the longest ‖D d‖ allowed.
    """

    jacobian: ResidualJacobian
    units: Tensor | None
    space: StepSpace
    scale: float
    rounding: float
    reach: float

    def step(self, coordinates: Tensor) -> Tensor:
        """d, (n,)."""
        d = self.space.vector(coordinates)
        return d if self.units is None else d / self.units

    def size(self, gradient: Tensor, damping: float) -> float:
        """How large a gradient (n,) is, in the metric of the damped Gauss-Newton matrix where that is known."""
        g = gradient.double()
        return self.space.reduced.dual_norm(g if self.units is None else g / self.units, damping)


class ResidualAttempt(StepAttempt):
    """One step of :class:`LeastSquares`.

    Args:
        settings: what the user chose.
        memory, parameters, frozen: see :class:`StepAttempt`.
        owners: what earlier Jacobians have found; completed.
        box: bounds on the parameters; None for none.
    """

    def __init__(
        self,
        settings: Settings,
        memory: Memory,
        parameters: ParameterVector,
        frozen: FrozenClosure,
        owners: KnownOwners,
        box: Box | None,
    ) -> None:
        super().__init__(memory, parameters, frozen)
        self._settings, self._owners, self._box = settings, owners, box
        self._loss: Tensor
        self._gradient: Tensor
        self._spent = Cost()  # on trials
        self._follows = False  # whether a trial's residuals differ from those of the start
        self._there: tuple[Tensor, Tensor] | None = None  # the last trial's step (n,), and the loss with its graph

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        return self._loss, self._gradient

    def run(self) -> tuple[StepRecord, Memory]:
        record = self._started(self._linearise)
        memory, jacobian = self._memory, self._jacobian
        if not record.finite:
            return replace(record, outcome=StepOutcome.NON_FINITE), replace(memory, refusals=memory.refusals + 1)
        memory = memory.meet(record.gradient_norm)
        if record.gradient_norm <= self._settings.tolerance:
            record = replace(record, cost=record.cost + Cost(linearisations=1))
            return self._stationary(record, memory, self._frozen.linearise())
        ground, memory = self._ground(jacobian, memory)
        reduced = ground.space.reduced
        return self._search(replace(record, factorisation=reduced.kind, rank=reduced.rank), memory, ground)

    def _linearise(self) -> StepRecord:
        """Residuals, Jacobian and gradient."""
        self._jacobian = jacobian = ResidualJacobian.at(self._frozen, self._parameters, self._owners)
        self._loss, self._residuals, self._nodes = jacobian.loss, jacobian.residuals, jacobian.nodes
        self._gradient = (jacobian.T @ jacobian.residuals).to(self._parameters.dtype)
        record = self._opened(Cost(losses=jacobian.evaluations, jacobian_passes=jacobian.backward_passes))
        return replace(record, gradient_norm=float(self._free(self._gradient).norm()))

    # --- the linearisation --------------------------------------------------------------------------------------

    def _ground(self, jacobian: ResidualJacobian, memory: Memory) -> tuple[_Ground, Memory]:
        norms = self._settings.scaling.norms(jacobian, memory.column_norms)
        units = None if norms is None else norms.where(norms > 0, 1.0)
        scaled: RowMatrix = jacobian if units is None else ScaledRows(jacobian, units)
        memory = replace(memory, column_norms=norms)
        if memory.curvature_scale == 0.0:
            memory = replace(memory, curvature_scale=_curvature_along_gradient(scaled, jacobian.residuals))
        space = self._space(scaled, units, memory)
        w = self._parameters.get().double()
        reach = self._settings.scaling.reach(w if units is None else units * w, first=memory.steps == 0)
        rounding = self._rounding(jacobian, w)
        return _Ground(jacobian, units, space, memory.curvature_scale, rounding, reach), memory

    def _space(self, scaled: RowMatrix, units: Tensor | None, memory: Memory) -> StepSpace:
        if self._box is not None:
            boxed = BoxLeastSquares(scaled.written_out(), *self._box.room(self._parameters.get(), units))
            return StepSpace(boxed, boxed.vector)
        # A λ above all eigenvalues leaves the gradient itself, which must not be left out.
        size = min(memory.damping * memory.curvature_scale, LEAST_SHARE * scaled.squared_norm())
        return self._settings.factorisation.of(scaled, self._settings.share * size, draw=memory.steps)

    def _rounding(self, jacobian: ResidualJacobian, w: Tensor) -> float:
        """Of a decrease: that of w and of ρ, taken as random."""
        values = jacobian.residuals
        sizes = values.abs() + (jacobian @ w).abs()
        return _ROUNDING * torch.finfo(self._loss.dtype).eps * float((values * sizes).norm())

    # --- trials -------------------------------------------------------------------------------------------------

    def _search(self, record: StepRecord, memory: Memory, ground: _Ground) -> tuple[StepRecord, Memory]:
        """Try one λ after the other until a step is accepted."""
        rule, settings, residuals = self._settings.damping, self._settings, ground.jacobian.residuals
        damping, patience, promised, shifted = memory.damping, _PATIENCE, False, residuals
        shift = None if memory.last_move is None else settings.momentum * memory.last_move
        if shift is not None:
            shifted = self._residuals_at(shift)
        place = lambda u: ground.step(u) if shift is None else ground.step(u) + shift
        for failures in range(settings.max_trials):
            step = chord_iterations(
                ground.space.reduced,
                residuals,
                shifted,
                damping * ground.scale,
                lambda u: self._residuals_at(place(u)),
                limit=rule.limit,
                max_iterations=settings.corrections,
                rounding=ground.rounding,
            )
            record = replace(record, iterations=step.iterations, damping=damping * ground.scale)
            there = place(step.coordinates)
            fine = 0 < step.promise <= _FINE * ground.rounding
            if self._stays(step, ground, there, record.damping, fine):
                image = step.image if shift is None else step.image + ground.jacobian @ shift
                return self._accept(record, memory, step, residuals, there, image)
            patience -= fine
            if patience == 0:
                break
            promised |= not fine and step.promise > 0
            # λ may be off by many orders of magnitude, as where steps have become long on the way out of a saddle.
            damping = rule.again(damping, step.ratio) * 2.0 ** max(failures - _SOON, 0)
            shift, shifted = None, residuals
        if promised and not self._follows:
            raise StaleLossError(
                "the loss has a derivative, but at no trial point was it another than at the start: it does not follow "
                "the parameters. Look for a result that is kept from an earlier call, for detach() or .data, and for "
                "rounding, and compute all that depends on the parameters anew inside the closure."
            )
        spent = record.cost + self._spent
        record = replace(record, outcome=StepOutcome.REJECTED, trials=self._spent.losses, cost=spent)
        # Not the last λ tried: where rounding is what fails steps, it says nothing of the next batch.
        return record, replace(memory, damping=rule.again(memory.damping, math.inf))

    def _stays(self, step: ChordStep, ground: _Ground, there: Tensor, damping: float, fine: bool) -> bool:
        """Whether a step is good enough. Where its decrease is rounding, ``fine``, the gradient decides."""
        rule = self._settings.damping
        decrease = math.inf if fine and step.decrease >= -ground.rounding else step.decrease
        if not rule.accepts(step.ratio, decrease, step.promise) or step.length > ground.reach:
            return False
        gradient = self._gradient_there(there)
        if not bool(gradient.isfinite().all()):
            return False
        before, after = (self._free(g) for g in (self._gradient, gradient))
        return not fine or ground.size(after, damping) <= _LOWER * ground.size(before, damping)

    def _accept(
        self,
        record: StepRecord,
        memory: Memory,
        step: ChordStep,
        residuals: Tensor,
        there: Tensor,
        image: Tensor,
    ) -> tuple[StepRecord, Memory]:
        self._keep = True
        slope, curvature = float(residuals @ image), float(image @ image)
        predicted = -slope - curvature / 2
        record = replace(
            record,
            new_loss=record.loss - step.decrease,
            trials=self._spent.losses,
            step_length=1.0,
            direction_norm=float(there.norm()),
            slope=slope,
            curvature=curvature,
            predicted_decrease=predicted,
            actual_decrease=step.decrease,
            rho=step.decrease / predicted if predicted > 0 else math.nan,
            taylor_error=predicted - step.decrease,
            cost=record.cost + self._spent,
        )
        damping = self._settings.damping.after(record.damping / memory.curvature_scale, step.ratio)
        last_move = there if self._settings.momentum > 0 else None
        return record, replace(memory, damping=damping, loss=record.new_loss, last_move=last_move)

    # --- evaluations --------------------------------------------------------------------------------------------

    def _residuals_at(self, step: Tensor) -> Tensor:
        """ρ(w + d), (N,); nan where the closure cannot be evaluated there."""
        self._parameters.move(self._snapshot, step.to(self._parameters.dtype), 1.0)
        self._spent += Cost(losses=1)
        try:
            loss = self._frozen.loss_with_graph()
        except Exception as error:
            if not outside_the_domain(error):
                raise
            return torch.full_like(self._residuals, math.nan)
        if self._there is None and not self._nodes.isdisjoint(nodes_of(loss)):
            self._spent += Cost(losses=1)  # the numbers of nodes may agree by chance, the nodes themselves do not
            check_fresh(loss, self._frozen.loss_with_graph(), self._parameters.tensors)
        self._there, values = (step, loss), require_residuals(loss).values.double()
        self._follows = self._follows or not torch.equal(values, self._residuals)
        return values

    def _gradient_there(self, step: Tensor) -> Tensor:
        """∇f(w + d), (n,); leaves the parameters there."""
        if self._there is None or not torch.equal(self._there[0], step):
            self._residuals_at(step)
        assert self._there is not None
        self._spent += Cost(jacobian_passes=1)
        return self._parameters.flatten(later_grad(self._there[1], self._parameters.tensors, whole=True))

    def _free(self, gradient: Tensor) -> Tensor:
        """The gradient without the entries that bounds hold back."""
        return gradient if self._box is None else self._box.free(gradient, self._parameters.get())


def _curvature_along_gradient(jacobian: RowMatrix, residuals: Tensor) -> float:
    """‖Jg‖²/‖g‖², the scale of λ; 1 where that is no positive number."""
    gradient = jacobian.T @ residuals
    image = jacobian @ (gradient / gradient.norm())
    scale = float(image @ image)
    return scale if 0 < scale < math.inf else 1.0
