"""Adaptive cubic regularisation: the weight of a cubic term in place of a radius."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from imstep.globalization.estimate import first_root
from imstep.globalization.model import LineModel, Trial
from imstep.globalization.search import Reason, SearchState, StepSearch, Verdict, require_descent


@dataclass(frozen=True)
class AdaptiveCubic(StepSearch):
    """Step to the minimiser along d of the model with a cubic term, and let its weight σ follow the ratio rho.

        m(t) + σ (t‖d‖)³/3;   rho = (f - f(w + t d)) / (q(t) - σ (t‖d‖)³/3)

        rho > success:   σ <- σ / factor;      rho < acceptance:   σ <- max(factor σ, 3 E(t)/(t‖d‖)³)

    It belongs with the solver :class:`~imstep.optim.CubicRegularization`, whose directions have their minimiser at
    t = 1. A refused trial is not solved for again but shortened to the minimiser along d with the new σ. The measured
    error E raises σ at once to where the cubic term makes up for it. σ is kept as M/2, half the third derivative that
    it bounds.

    Args:
        sigma: σ before the first step, >= 0; 0 to let the first steps' errors set it.
        acceptance: the least rho of an accepted trial, in (0, 1).
        success: the rho from which σ falls, in [acceptance, 1).
        factor: > 1.

    Raises:
        ValueError: an argument is out of range.

    Cost: a loss per trial.

    Source: Cartis, Gould and Toint, Mathematical Programming 127 (2011), 245-295, Algorithm 2.1 and the constants of
        its section 7; raising σ by the error as Gould, Porcelli and Toint, Comput. Optim. Appl. 53 (2012), 1-22;
        shortening along d, and no start for σ, are our choice.

    Example:
        >>> search = AdaptiveCubic(sigma=6.0)
        >>> search.propose(search.initial(), LineModel(loss=1.0, slope=-2.0, curvature=-4.0, norm=1.0))
        1.0
    """

    sigma: float = 0.0
    acceptance: float = 0.1
    success: float = 0.9
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"sigma, the weight of the cubic term, is at least 0 and finite, got {self.sigma}.")
        if not (0 < self.acceptance <= self.success < 1 < self.factor < math.inf):
            raise ValueError(
                "adaptive cubic regularisation needs 0 < acceptance <= success < 1 < factor, got "
                f"{self.acceptance}, {self.success} and {self.factor}."
            )

    def initial(self) -> SearchState:
        return SearchState(third_derivative=2 * self.sigma)

    def propose(self, state: SearchState, model: LineModel) -> float:
        require_descent(model)
        return _minimizer(state, model)

    def judge(self, state: SearchState, model: LineModel, trial: Trial) -> Verdict:
        t, error = trial.step_length, model.taylor_error(trial)
        length = t * model.norm  # of which no cube is formed, which could overflow or vanish
        over_cube = lambda value: value / length / length / length
        if not math.isfinite(error):
            # The σ for which the minimiser along d is a tenth as long.
            least = over_cube(-model.slope - model.curvature * t / 10) * t * 100
            raised = replace(state, third_derivative=max(self.factor * state.third_derivative, 2 * least))
            return Verdict(False, t / 10, -math.inf, error, raised, Reason.NON_FINITE)
        promised = model.decrease(t) - state.third_derivative * length * length * length / 6
        rho = (model.decrease(t) - error) / promised if promised > 0 else math.nan
        if rho >= self.acceptance:
            sigma = state.third_derivative
            if rho > self.success:
                sigma /= self.factor
            elif sigma == 0:
                sigma = max(over_cube(6 * error), 0.0)
            return Verdict(True, t, rho, error, replace(state, third_derivative=sigma), Reason.ACCEPTED)
        raised = replace(state, third_derivative=max(self.factor * state.third_derivative, over_cube(6 * error)))
        shorter = min(max(_minimizer(raised, model), t / 10), t / 2)
        return Verdict(False, shorter, rho, error, raised, Reason.INSUFFICIENT_DECREASE)

    def reject(self, state: SearchState, model: LineModel, step_length: float) -> SearchState:
        return replace(state, third_derivative=self.factor * state.third_derivative)


def _minimizer(state: SearchState, model: LineModel) -> float:
    """The t of least m(t) + σ(t‖d‖)³/3; 1 where there is none."""
    # In the length t‖d‖, so that no cube of the norm can overflow.
    slope, curvature = model.slope / model.norm, model.curvature / model.norm / model.norm
    length = first_root(state.third_derivative / 2, curvature, slope)
    return length / model.norm if math.isfinite(length) else 1.0
