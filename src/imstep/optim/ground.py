"""What a step of least squares stands on: the linearisation at a point."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.curvature.penalty import Penalty
from imstep.linalg import BoxLeastSquares, DampedLeastSquares, RidgeLeastSquares, RowMatrix, StepSpace
from imstep.linalg.condensed import in_all_rows
from imstep.optim.box import Box
from imstep.optim.memory import Memory
from imstep.optim.residual_settings import Settings

LEAST_SHARE = 1e-2
"""Of the trace of JJᵀ that is always taken account of."""

_ROUNDING = 10.0
"""Times the rounding of residuals: by so much losses may be wrong."""


@dataclass(frozen=True, eq=False)
class Ground:
    """The linearisation at w.

    Attributes:
        jacobian: J at w; above the rows of earlier steps, where those are kept.
        residuals: ρ, and zeros for these.
        units: D (n,), in which entries of a step are measured; None for 1.
        space: damped least squares with J D⁻¹.
        factorised: what J is factorised into for them.
        ridge: ``space``'s where there is a penalty, else None.
        scale: λ is a multiple of it.
        rounding: of a decrease of the loss.
        reach: the longest ‖D d‖ allowed.
    """

    jacobian: RowMatrix
    residuals: Tensor
    units: Tensor | None
    space: StepSpace
    factorised: DampedLeastSquares
    ridge: RidgeLeastSquares | None
    scale: float
    rounding: float
    reach: float

    def step(self, coordinates: Tensor) -> Tensor:
        """d, (n,)."""
        d = self.space.vector(coordinates)
        return d if self.units is None else d / self.units

    def around(self, shift: Tensor | None) -> DampedLeastSquares:
        """Damped least squares for steps from w + ``shift`` (n,)."""
        if self.ridge is None or shift is None:
            return self.space.reduced
        return self.ridge.moved(shift.double() if self.units is None else self.units * shift)

    def size(self, gradient: Tensor, damping: float) -> float:
        """How large a gradient (n,) is, in the metric of the damped Gauss-Newton matrix where that is known."""
        g = gradient.double()
        return self.space.reduced.dual_norm(g if self.units is None else g / self.units, damping)


def ground_at(
    jacobian: RowMatrix,
    residuals: Tensor,
    eps: float,
    penalty: Penalty | None,
    parameters: ParameterVector,
    settings: Settings,
    memory: Memory,
    box: Box | None,
) -> tuple[Ground, Memory]:
    """What a step at the parameters stands on, and what to remember of it; ``eps`` is the rounding of the loss."""
    w = parameters.get().double()
    norms = settings.scaling.norms(jacobian, memory.column_norms)
    units = None if norms is None else norms.where(norms > 0, 1.0)
    memory = replace(memory, column_norms=norms)
    if memory.curvature_scale == 0.0:
        scale = _curvature_along_gradient(_in_units(jacobian, units), residuals, penalty, w)
        memory = replace(memory, curvature_scale=scale)
    damping, more = memory.damping * memory.curvature_scale, 0.0
    if penalty is not None and penalty.alike and units is None:
        more = penalty.rates[0]
    elif penalty is not None:
        # Units in which λ and the penalty together are a multiple of I: then a larger multiple is a larger λ.
        ones = torch.ones_like(w) if units is None else units
        units = (ones.square() + penalty.factors.double() / damping).sqrt()
    scaled = _in_units(jacobian, units)
    if box is not None:
        rows, rotation = scaled.condensed()
        boxed = BoxLeastSquares(rows.written_out(), *box.room(parameters.get(), units))
        space = in_all_rows(StepSpace(boxed, boxed.vector), rotation)
    else:
        # A λ above all eigenvalues leaves the gradient itself, which must not be left out.
        size = min(damping + more, LEAST_SHARE * scaled.squared_norm())
        space = settings.factorisation.of(scaled, settings.share * size, draw=memory.steps)
    ridge, factorised = None, space.reduced
    if penalty is not None:
        factors, at = penalty.factors.double(), w
        if units is not None:
            factors, at = factors / units.square(), units * w
        ridge = RidgeLeastSquares(scaled, space, factors, at, more)
        space = StepSpace(ridge, ridge.vector)
    reach = settings.scaling.reach(w if units is None else units * w, first=memory.steps == 0)
    rounding = _rounding(jacobian, residuals, penalty, w, eps)
    ground = Ground(jacobian, residuals, units, space, factorised, ridge, memory.curvature_scale, rounding, reach)
    return ground, memory


def _in_units(jacobian: RowMatrix, units: Tensor | None) -> RowMatrix:
    return jacobian if units is None else jacobian.in_units(units)


def _rounding(jacobian: RowMatrix, residuals: Tensor, penalty: Penalty | None, w: Tensor, eps: float) -> float:
    """Of a decrease: that of w and of ρ, taken as random."""
    rounding = float((residuals * (residuals.abs() + (jacobian @ w).abs())).norm())
    if penalty is not None:
        rounding = math.hypot(rounding, 2 * float((penalty.factors * w.square()).norm()))
    return _ROUNDING * eps * rounding


def _curvature_along_gradient(jacobian: RowMatrix, residuals: Tensor, penalty: Penalty | None, w: Tensor) -> float:
    """‖Jg‖²/‖g‖², the scale of λ, and what a penalty adds; 1 where that is no positive number."""
    gradient = jacobian.T @ residuals
    if penalty is not None:
        gradient = gradient + penalty.factors * w
    unit = gradient / gradient.norm()
    image = jacobian @ unit
    scale = float(image @ image)
    if penalty is not None:
        scale += float(unit @ (penalty.factors * unit))
    return scale if 0 < scale < math.inf else 1.0
