"""The Levenberg-Marquardt method in residual space."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.residual_jacobian import ResidualJacobian, require_residuals
from imstep.globalization import ContractionDamping, SearchState
from imstep.linalg import GramFactorisation, PivotedCholesky
from imstep.optim.chord import ChordStep, chord_iterations
from imstep.optim.evaluable import outside_the_domain
from imstep.optim.memory import Memory
from imstep.optim.record import Cost, StepOutcome, StepRecord
from imstep.optim.step_attempt import StepAttempt
from imstep.optim.stepwise import StepwiseOptimizer

LEAST_SHARE = 1e-2
"""Of the trace of JJᵀ that is always taken account of."""


@dataclass(frozen=True)
class Settings:
    """What a user chooses: see :class:`LeastSquares`."""

    damping: ContractionDamping
    factorisation: GramFactorisation
    corrections: int
    share: float
    momentum: float
    tolerance: float
    max_trials: int

    def __post_init__(self) -> None:
        if not isinstance(self.damping, ContractionDamping):
            raise TypeError(f"damping must be a ContractionDamping, got {self.damping!r}.")
        if not isinstance(self.factorisation, GramFactorisation):
            raise TypeError(f"factorisation must be a GramFactorisation, got {self.factorisation!r}.")
        if self.corrections < 1 or self.max_trials < 1:
            raise ValueError(
                f"corrections and max_trials are at least 1, got {self.corrections} and {self.max_trials}."
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is at least 0 and less than 1, got {self.momentum}.")
        if not (0 <= self.share < math.inf and self.tolerance >= 0):
            raise ValueError(f"share and tolerance are at least 0, got {self.share} and {self.tolerance}.")


class LeastSquares(StepwiseOptimizer):
    """Levenberg-Marquardt steps in residual space, for losses that are sums of squares: physics-informed networks.

    One step reads the Jacobian J of the residuals ρ off autograd's graph, factorises JJᵀ by as few columns as λ allows,
    and moves by accelerated chord iterations, which keep J and only evaluate ρ, towards

        min over d of ‖ρ(w + d)‖² + λ‖d‖²

    λ follows from how fast their corrections shrink; other λ are tried without a new factorisation. There is no
    learning rate, and the loss never rises.

    Data, random numbers and buffers are the same for all evaluations of one step. A step that cannot be accepted leaves
    parameters and buffers bit for bit as they were.

    Args:
        params: parameters or parameter groups; those with ``requires_grad=False`` are left alone.
        damping: how λ develops; its ``initial`` is relative to the curvature along the first gradient.
        factorisation: of JJᵀ; default :class:`~imstep.linalg.PivotedCholesky`, few columns, or all of JJᵀ where few do
            not do; :class:`~imstep.linalg.RandomizedNystrom`; :class:`~imstep.linalg.DenseFactorisation`.
        corrections: chord iterations per trial at most, >= 1; 1 for plain Levenberg-Marquardt steps.
        share: trace of what the factorisation leaves out of JJᵀ, as a fraction of λ, >= 0.
        momentum: μ, in [0, 1): the step is damped towards μ times the last one, min ‖ρ(w + d)‖² + λ‖d - μ d'‖², for an
            evaluation more; for residuals drawn anew each step. A trial that fails is repeated without.
        tolerance: ‖g‖ at which a point counts as stationary, >= 0.
        max_trials: values of λ tried per step, >= 1.
        max_refusals: consecutive steps with a loss or gradient that is not finite before an exception, >= 1.

    Attributes:
        last_step: the :class:`StepRecord` of the last step; None before the first. Its ``iterations`` are the
            corrections of the step, its ``trials`` all evaluations of residuals, and its ``status`` is None.
        cost: everything spent so far.

    Raises:
        ValueError, TypeError: see :class:`~imstep.curvature.ParameterVector`; a number is out of range.
        NoResidualsError: at a step: the loss is no sum of squares, or its residuals depend on each other.

    Cost: a step on N residuals takes a forward and two backward passes (three to five at first), p columns of JJᵀ,
        about N p² operations, and a forward pass per correction; p is a few times the number of eigenvalues of JJᵀ
        above λ. Where that is more than a third of N, all of JJᵀ, and N³/3 operations for each λ.

    Source: our own, from Levenberg-Marquardt in residual space as for neural quantum states (Chen and Heyl,
        arXiv 2302.01941) and physics-informed networks (Müller and Zeinhofer, arXiv 2302.13163); geodesic acceleration
        (Transtrum and Sethna, arXiv 1201.5885); momentum as in SPRING (Goldshlager, Abrahamsen and Lin,
        arXiv 2401.10190).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.linspace(0, 1, 20)[:, None]
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
        >>> optimizer = LeastSquares(model.parameters())
        >>> for _ in range(30):
        ...     loss = optimizer.step(lambda: torch.nn.functional.mse_loss(model(x), (6 * x).sin()))
        >>> bool(loss < 1e-6)
        True
    """

    _key = "least_squares"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        damping: ContractionDamping | None = None,
        factorisation: GramFactorisation | None = None,
        corrections: int = 4,
        share: float = 1.0,
        momentum: float = 0.0,
        tolerance: float = 1e-12,
        max_trials: int = 30,
        max_refusals: int = 5,
    ) -> None:
        self._settings = Settings(
            damping or ContractionDamping(),
            factorisation or PivotedCholesky(),
            corrections,
            share,
            momentum,
            tolerance,
            max_trials,
        )
        memory = Memory(search=SearchState(), damping=self._settings.damping.initial)
        super().__init__(params, memory, max_refusals)
        self._owners = KnownOwners()

    def _attempt(self, frozen: FrozenClosure) -> StepAttempt:
        return _Attempt(self._settings, self._memory, self._parameters, frozen, self._owners)

    def _parts(self) -> dict[str, Any]:
        return {"owners": self._owners.state_dict()}

    def _load_parts(self, parts: dict[str, Any]) -> None:
        self._owners.load_state_dict(parts["owners"])


class _Attempt(StepAttempt):
    """One step in residual space."""

    def __init__(
        self,
        settings: Settings,
        memory: Memory,
        parameters: ParameterVector,
        frozen: FrozenClosure,
        owners: KnownOwners,
    ) -> None:
        super().__init__(memory, parameters, frozen)
        self._settings, self._owners = settings, owners
        self._loss: Tensor
        self._gradient: Tensor
        self._residuals: Tensor

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        return self._loss, self._gradient

    def run(self) -> tuple[StepRecord, Memory]:
        memory = self._memory
        jacobian = ResidualJacobian.at(self._frozen.loss_with_graph(watch=True), self._parameters, self._owners)
        self._loss, self._residuals = jacobian.loss, jacobian.residuals
        self._gradient = (jacobian.T @ jacobian.residuals).to(self._parameters.dtype)
        record = self._opened(Cost(losses=1, jacobian_passes=jacobian.backward_passes))
        loss, gradient_norm = record.loss, record.gradient_norm
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return replace(record, outcome=StepOutcome.NON_FINITE), replace(memory, refusals=memory.refusals + 1)
        memory = memory.meet(gradient_norm)
        if gradient_norm <= self._settings.tolerance:
            record = replace(record, cost=record.cost + Cost(linearisations=1))
            return self._stationary(record, memory, self._frozen.linearise())
        if memory.curvature_scale == 0.0:
            memory = replace(memory, curvature_scale=_curvature_along_gradient(jacobian))
        return self._search(record, memory, jacobian)

    def _search(
        self, record: StepRecord, memory: Memory, jacobian: ResidualJacobian
    ) -> tuple[StepRecord, Memory]:
        """Try one λ after the other until a step is accepted."""
        rule, settings, scale = self._settings.damping, self._settings, memory.curvature_scale
        gram = jacobian.gram()
        # A λ above all eigenvalues leaves the gradient itself, which must not be left out.
        size = min(memory.damping * scale, LEAST_SHARE * float(gram.diagonal().sum()))
        reduced = settings.factorisation.factorise(gram, settings.share * size, draw=memory.steps)
        basis = jacobian if reduced.pivots is None else jacobian.rows(reduced.pivots)
        damping, evaluations, shift = memory.damping, 0, None
        if settings.momentum > 0 and memory.last_move is not None:
            shift, evaluations = settings.momentum * memory.last_move, 1
        vector = lambda u: basis.T @ reduced.weights(u) + (0.0 if shift is None else shift)
        shifted = jacobian.residuals if shift is None else self._residuals_at(shift)
        for _ in range(settings.max_trials):
            step = chord_iterations(
                reduced,
                jacobian.residuals,
                shifted,
                damping * scale,
                lambda u: self._residuals_at(vector(u)),
                limit=rule.limit,
                max_iterations=settings.corrections,
            )
            evaluations += step.evaluations
            record = replace(record, iterations=step.iterations, trials=evaluations, damping=damping * scale)
            if rule.accepts(step.ratio, step.decrease, step.promise):
                image = step.image if shift is None else step.image + jacobian @ shift
                return self._accept(record, memory, step, jacobian.residuals, vector(step.coordinates), image)
            damping, shift, shifted = rule.again(damping, step.ratio), None, jacobian.residuals
        record = replace(record, outcome=StepOutcome.REJECTED, cost=record.cost + Cost(losses=evaluations))
        # Not the last λ tried: where rounding is what fails steps, it says nothing of the next batch.
        return record, replace(memory, damping=rule.again(memory.damping, math.inf))

    def _accept(
        self,
        record: StepRecord,
        memory: Memory,
        step: ChordStep,
        residuals: Tensor,
        vector: Tensor,
        image: Tensor,
    ) -> tuple[StepRecord, Memory]:
        self._keep = True
        direction = vector.to(self._parameters.dtype)
        self._parameters.move(self._snapshot, direction, 1.0)
        slope, curvature = float(residuals @ image), float(image @ image)
        predicted = -slope - curvature / 2
        record = replace(
            record,
            new_loss=record.loss - step.decrease,
            step_length=1.0,
            direction_norm=float(vector.norm()),
            slope=slope,
            curvature=curvature,
            predicted_decrease=predicted,
            actual_decrease=step.decrease,
            rho=step.decrease / predicted if predicted > 0 else math.nan,
            taylor_error=predicted - step.decrease,
            cost=record.cost + Cost(losses=record.trials),
        )
        damping = self._settings.damping.after(record.damping / memory.curvature_scale, step.ratio)
        last_move = vector if self._settings.momentum > 0 else None
        return record, replace(memory, damping=damping, loss=record.new_loss, last_move=last_move)

    def _residuals_at(self, vector: Tensor) -> Tensor:
        """ρ(w + d), (N,); nan where the closure cannot be evaluated there."""
        self._parameters.move(self._snapshot, vector.to(self._parameters.dtype), 1.0)
        try:
            return require_residuals(self._frozen.loss_with_graph()).values.double()
        except Exception as error:
            if not outside_the_domain(error):
                raise
            return torch.full_like(self._residuals, math.nan)


def _curvature_along_gradient(jacobian: ResidualJacobian) -> float:
    """‖Jg‖²/‖g‖², the scale of λ; 1 where that is no positive number."""
    gradient = jacobian.T @ jacobian.residuals
    image = jacobian @ (gradient / gradient.norm())
    scale = float(image @ image)
    return scale if 0 < scale < math.inf else 1.0
