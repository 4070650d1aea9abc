"""One step of the Newton-Krylov method, from the first evaluation on a batch to the last."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from imstep.curvature.deferred import DeferredLinearisation
from imstep.curvature.layers import LayerObserver
from imstep.curvature.operators import SymmetricOperator
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import FrozenBatch, Linearised
from imstep.curvature.shared import halved
from imstep.curvature.third import derivatives_along, third_derivative_along
from imstep.curvature.variance import gradient_variance
from imstep.globalization import LineDerivatives, LineModel
from imstep.linalg import IndefinitePreconditionerError, LinearOperator
from imstep.linalg.precision import coarsest_eps
from imstep.optim.direction import Direction, combined, downhill
from imstep.optim.forcing import Situation
from imstep.optim.masked import masked
from imstep.optim.memory import Memory
from imstep.optim.pace import Pace
from imstep.optim.preconditioning import Evidence, Preconditioner
from imstep.optim.record import (
    GAUSS_NEWTON_PRODUCT_COST,
    HESSIAN_PRODUCT_COST,
    LINEARISATION_COST,
    LOSS_COST,
    Cost,
    StepOutcome,
    StepRecord,
)
from imstep.optim.solving import NewtonSystem
from imstep.optim.step_attempt import StepAttempt
from imstep.optim.strategies import Strategies
from imstep.optim.trials import Trials, try_steps

CONTRACTION = 0.5
"""How far the gradient norm must fall in a full Newton step for accuracy to be worth more than another step."""

CONFIDENCE = 0.95
"""What takes its place, per full step in a row that the model foresaw, where the gradient norm does not fall so far."""

FAR = 10
"""Step length from which a damped solution shows that curvature has fallen by orders of magnitude."""


@dataclass(frozen=True, eq=False)
class _Setting:
    """What the Krylov iteration of a step works with."""

    candidates: list[SymmetricOperator]
    preconditioner: LinearOperator | None
    damping: float
    situation: Situation
    refresh: Cost  # of the preconditioner, apart from products
    model: LinearOperator | None

    @property
    def products(self) -> Cost:
        """The products made so far."""
        return Cost(
            gauss_newton_products=sum(a.products for a in self.candidates if a.definite),
            hessian_products=sum(a.products for a in self.candidates if not a.definite),
        )


class Attempt(StepAttempt):
    """One step of the Newton-Krylov method.

    Attributes:
        loss, gradient: on the batch, 0-dim and (n,).
        point: what the curvature is taken from; the batch, or the part of it given for that.
    """

    def __init__(
        self,
        strategies: Strategies,
        memory: Memory,
        preconditioner: Preconditioner,
        parameters: ParameterVector,
        frozen: FrozenBatch,
        part: FrozenBatch | None = None,
        pace: Pace | None = None,
    ) -> None:
        super().__init__(memory, parameters, frozen, pace)
        self._strategies, self._preconditioner, self._part = strategies, preconditioner, part
        self.loss: Tensor
        self.gradient: Tensor
        self.point: Linearised
        self._observer: LayerObserver | None = None
        self._deferred: DeferredLinearisation | None = None

    def run(self) -> tuple[StepRecord, Memory]:
        point = self._part or self._frozen
        try:
            record, memory = self._run()
        finally:
            if self._part is not None:  # of which products may have evaluated pieces
                self._part.undo()
        late = 0 if self._deferred is None else self._deferred.made
        cost = record.cost + Cost(linearisations=point.repeated + late)
        return replace(record, cost=cost, static=self.point.static), memory

    def _run(self) -> tuple[StepRecord, Memory]:
        record = self._started(self._evaluate)
        memory = self._memory
        gradient_norm = record.gradient_norm
        if not record.finite:
            return self._not_finite(record)
        same = self._goes_on(record.loss)
        if not same:
            self._preconditioner.forget()
        contraction = self._contraction(gradient_norm) if same else 1.0
        memory = memory.meet(gradient_norm)
        memory = memory.resumed() if same else memory
        if self._strategies.measures(memory.steps):
            variance = gradient_variance(self.point, self._parameters)
            record = replace(record, gradient_variance=variance, cost=record.cost + Cost(variances=1))
        if memory.at_rest(gradient_norm, self._strategies.tolerance):
            return self._stationary(record, memory, self.point)
        setting, memory = self._set_up(memory, record.cost, contraction)
        direction, taken, memory = self._solve(setting, memory)
        record = replace(
            record,
            status=direction.status,
            iterations=direction.iterations,
            products=setting.products.products,
            damping=setting.damping,
            cost=record.cost + setting.refresh + setting.products + direction.cost,
        )
        return self._move(record, memory, direction, taken)

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        return self.loss, self.gradient

    def _evaluate(self) -> StepRecord:
        """Loss and gradient of the batch, and the tape that products are made from."""
        self._observer, radius = self._preconditioner.observer(), self._memory.search.radius
        makers = self._strategies.solver, self._strategies.curvature
        keep_graph = any(m.needs_graph for m in makers) or self._strategies.measures(self._memory.steps)
        if self._part is None and not keep_graph and self._observer is None and self._needs_no_record():
            self.point = self._deferred = DeferredLinearisation(self._frozen)
            self.loss, self.gradient = self.point.loss, self.point.gradient
            return self._opened(Cost(gradients=1), radius)
        if self._part is None:
            self.point = self._frozen.linearise(self._observer, keep_graph=keep_graph)
            self.loss, self.gradient = self.point.loss.detach(), self.point.gradient
            return self._opened(Cost(linearisations=1), radius)
        self.loss, self.gradient = self._frozen.watched_gradient()
        try:
            self.point = self._part.linearise(self._observer, keep_graph=keep_graph)
        finally:
            self._part.undo()
        self.point = replace(self.point, penalty=self._frozen.penalty)
        return self._opened(Cost(gradients=1, linearisations=1), radius)

    def _held(self, operator: LinearOperator | None) -> LinearOperator | None:
        """It, without the entries that are held fixed."""
        return None if operator is None else masked(operator, self._mask)

    def _needs_no_record(self) -> bool:
        """Whether neither direction nor preconditioner nor damping come from products."""
        makers = self._strategies.solver, self._preconditioner
        undamped = self._memory.damping == 0 and not self._strategies.momentum
        return undamped and not (any(m.needs_products for m in makers) or self._strategies.curvature.needs_record)

    def _goes_on(self, loss: float) -> bool:
        """Whether the step starts where the last one ended; another loss there is that of another batch."""
        return abs(loss - self._memory.loss) <= 1e2 * coarsest_eps([self.loss, *self._parameters.tensors]) * abs(loss)

    def _contraction(self, gradient_norm: float) -> float:
        """How much the last full Newton steps tell that accuracy pays: a factor on the gradient, 1 for nothing."""
        if self._memory.full_steps < 2:
            return 1.0
        # On ill-conditioned problems ‖g‖ does not fall from step to step, but that the model stays right tells as much.
        confidence = CONFIDENCE ** (self._memory.full_steps - 2)
        if gradient_norm < CONTRACTION * self._memory.gradient_norm:
            return min(gradient_norm / self._memory.gradient_norm, confidence)
        return confidence

    # --- direction ----------------------------------------------------------------------------------------------

    def _set_up(
        self, memory: Memory, cost: Cost, contraction: float
    ) -> tuple[_Setting, Memory]:
        relative_gradient = memory.gradient_norm / memory.largest_gradient_norm
        candidates = self._strategies.curvature.candidates(
            self.point, self._parameters, memory.progress, probe=memory.probe_in == 0, step=memory.steps
        )
        if self._strategies.solver.needs_halves:
            candidates = [halved(operator, self.point) for operator in candidates]
        if memory.curvature_scale == 0.0 and self._deferred is None:
            unit = self.gradient / memory.gradient_norm
            scale = abs(float(unit @ (candidates[-1] @ unit)))
            memory = replace(memory, curvature_scale=scale if 0 < scale < math.inf else 1.0)
        # Vanishes with the gradient, so that damping does not spoil superlinear convergence.
        damping = (memory.damping * math.sqrt(relative_gradient) + memory.safeguard) * memory.curvature_scale
        product_cost = GAUSS_NEWTON_PRODUCT_COST if candidates[-1].definite else HESSIAN_PRODUCT_COST
        product_cost += LINEARISATION_COST * self.point.repeats
        before = candidates[-1].products
        refresh = self._preconditioner.refresh(Evidence(self.point, self._observer, candidates[-1], damping))
        refresh_cost = refresh.gradient_equivalents + product_cost * (candidates[-1].products - before)
        situation = Situation(
            relative_gradient=relative_gradient,
            contraction=contraction,
            last_products=memory.products,
            fixed_cost=cost.gradient_equivalents + refresh_cost + LOSS_COST,
            product_cost=product_cost,
        )
        preconditioner = self._held(self._preconditioner.operator(damping))
        model = self._held(self._preconditioner.model())
        return _Setting(candidates, preconditioner, damping, situation, refresh, model), memory

    def _solve(self, setting: _Setting, memory: Memory) -> tuple[Direction, Direction, Memory]:
        """The direction by the first candidate that does not prove indefinite, or else by the last; what is taken."""
        radius = memory.search.radius
        if math.isfinite(radius) and self._pace.lr > 0:
            radius = min(radius, self._pace.longest / self._pace.lr)
        for operator in setting.candidates:
            before = operator.products
            system = NewtonSystem(
                operator,
                self.gradient,
                setting.damping,
                setting.preconditioner,
                self._preconditioner.pairs_wanted,
                self._strategies.forcing.rules(setting.situation),
                radius,
                memory.last_move if self._strategies.solver.uses_last_move else None,
                self.point,
                self._parameters,
                memory.search.third_derivative / 2,
                partial(third_derivative_along, self._part or self._frozen, self._parameters),
                setting.model,
                memory.steps,
                self._mask,
            )
            direction = self._within(self._solved(system))
            if not direction.status.disturbing:
                break
        tried = len(setting.candidates) > 1
        self._preconditioner.learn(direction.pairs)
        memory = memory.probed(operator is setting.candidates[0] if tried else None)
        if self._strategies.momentum and memory.last_move is not None:
            image = operator @ memory.last_move
            direction = combined(self.gradient, direction, memory.last_move, image, setting.damping)
        memory = replace(memory, products=operator.products - before)
        return *self._paced(direction, operator), memory

    def _paced(self, direction: Direction, operator: LinearOperator) -> tuple[Direction, Direction]:
        """A direction d to search along, and what D d of it is taken; another one where D d does not descend."""
        pace = self._pace
        if pace.rates is None:
            return direction, direction.times(pace.lr)
        share = pace.share(direction.vector)
        taken = direction.moved(share, operator @ share, self.gradient)
        if taken.descends(self.gradient):
            return direction, taken
        steepest = pace.steepest(self.gradient)
        if not bool(steepest.any()):
            return direction, direction.times(0.0)
        along = downhill(direction, operator, steepest, self.gradient)
        steepest = along.vector
        share = pace.share(steepest)
        return along, along.moved(share, operator @ share, self.gradient)

    def _solved(self, system: NewtonSystem) -> Direction:
        try:
            return self._strategies.solver.solve(system)
        except IndefinitePreconditionerError:
            # Rounding, where the loss has grown by so much that curvatures span more than the dtype resolves.
            return self._strategies.solver.solve(replace(system, preconditioner=None))

    # --- step length --------------------------------------------------------------------------------------------

    def _move(
        self, record: StepRecord, memory: Memory, direction: Direction, taken: Direction
    ) -> tuple[StepRecord, Memory]:
        if not math.isfinite(direction.curvature) or not 0 < direction.norm < math.inf:
            return replace(record, outcome=StepOutcome.REJECTED), memory.safeguarded(self._memory, accepted=False)
        direction, taken, chosen = self._chosen(direction, taken)
        model, cost = self._expanded(direction)
        record = replace(record, cost=record.cost + chosen + cost)
        search, line = self._strategies.step, replace(self._along(direction), model=model)
        longest = memory.reach / max(direction.norm, taken.norm)
        longest = min(longest, self._pace.longest / taken.norm) if taken.norm > 0 else longest
        trials = try_steps(search, memory.search, line, self._strategies.max_trials, longest)
        # What is learnt comes from the trials: they tell of the model, learning rates do not.
        taken, end = self._taken(search, taken, trials)
        full = abs(trials.step_length - 1) <= 0.1 and abs(trials.rho - 1) <= 0.1 and self._pace.whole
        judged = end.accepted or not trials.accepted
        realised = _realised(model, trials, search.full(model)) if judged else math.nan
        memory = replace(
            memory,
            search=trials.state,
            damping=self._strategies.damping.update(memory.damping, realised),
            curvature_scale=memory.curvature_scale / _excess(model, trials),
            loss=end.loss,
            failed=math.inf if end.accepted else trials.step_length * direction.norm,
            full_steps=memory.full_steps + 1 if end.accepted and full else 0,
            last_move=self._last_move(taken, end),
            progress=(model.loss - trials.loss) / max(abs(model.loss), torch.finfo(torch.float64).tiny),
        )
        memory = memory.safeguarded(self._memory, end.accepted)
        return self._finish(record, model, direction, end, taken), memory

    def _chosen(self, last: Direction, taken: Direction) -> tuple[Direction, Direction, Cost]:
        """The best iterate of a solver that has kept some, by the loss, and what is taken of it."""
        # Not before the last product: trials move the parameters that products are made with.
        rule = self._strategies.solver.chooses
        if rule is None or self._pace.rates is not None:
            return last, taken, Cost()
        best, cost = rule.best(last, self.gradient, lambda d: self._loss_at(d, 1.0))
        return best, best.times(self._pace.lr), cost

    def _last_move(self, taken: Direction, trials: Trials) -> Tensor | None:
        if not (self._strategies.momentum or self._strategies.solver.uses_last_move):
            return None
        return trials.step_length * taken.vector if trials.accepted else self._memory.last_move

    def _expanded(self, direction: Direction) -> tuple[LineModel, Cost]:
        """The model, with exact derivatives along the direction where the step search asks for them."""
        model = self._line(direction)
        if not self._strategies.step.needs_derivatives:
            return model, Cost()
        exact = derivatives_along(self._frozen, self._parameters, direction.vector)
        return replace(model, derivatives=LineDerivatives(*exact)), Cost(third_derivatives=1)


def _realised(model: LineModel, trials: Trials, full: float) -> float:
    """The actual decrease over what a full step promised: small also where the step had to be shortened."""
    if not trials.accepted or model.curvature <= 0:
        return trials.rho
    return (model.loss - trials.loss) / model.decrease(min(full, model.minimizer))


def _excess(model: LineModel, trials: Trials) -> float:
    """How many times too large the damping has proved; 1 unless that is far more than its own rule makes good."""
    # Where λ outweighs the curvature, d is about -g/λ, and the step that was right is that of λ/t.
    foreseen = trials.accepted and trials.rho > 0.75 and model.curvature > 0
    return trials.step_length if foreseen and trials.step_length > FAR else 1.0
