"""What the optimizer carries from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from imstep.globalization import SearchState
from imstep.optim.checking import CheckHistory, DrawHistory

LONGEST_WAIT = 64

SAFEGUARD = 1e-3
SAFEGUARD_GROWTH = 100.0
SAFEGUARD_DECAY = 4.0

RETREAT = 4.0
"""Factor by which steps become shorter where one is taken back, and longer again with each that is not."""



@dataclass(frozen=True)
class BetweenHistory:
    """How quasi-Newton steps and the Newton steps around them have done.

    Attributes:
        fall, cost: of the last Newton step: decrease of the loss, and gradient-equivalents.
        gain, spent: the same of the quasi-Newton steps since.
        share: how much they may spend, as a multiple of ``cost``.
        wait: Newton steps until the next quasi-Newton step.
        failures: runs of them in a row that have done worse than the Newton step behind them.
        same: whether one may follow the last step, which went on where the one before had ended and was accepted.
        wanted: whether a Newton step has wanted one.
    """

    fall: float = math.inf
    cost: float = 1.0
    gain: float = 0.0
    spent: float = 0.0
    share: float = 1.0
    wait: int = 1
    failures: int = 0
    same: bool = False
    wanted: bool = False

    @property
    def due(self) -> bool:
        """Whether the next step is to be tried as a quasi-Newton step."""
        return self.same and self.wait == 0

    def after_newton(self, fall: float, cost: float, same: bool, wanted: bool, longest: int) -> BetweenHistory:
        """After a Newton step, which judges the steps before it: twice as many next time, or a longer wait."""
        met = {"same": same and wanted, "wanted": self.wanted or wanted}
        last = replace(self, fall=fall, cost=cost, gain=0.0, spent=0.0, **met)
        if self.spent == 0:
            return replace(last, wait=max(self.wait - 1, 0))
        if self.gain * cost > fall * self.spent:
            return replace(last, share=2 * self.share, wait=0, failures=0)
        failures = self.failures + 1
        return replace(last, share=1.0, wait=min(2 ** (failures - 1), longest), failures=failures)

    def after_quasi_newton(self, fall: float, cost: float) -> BetweenHistory:
        """After a quasi-Newton step: another one while they do better than the last Newton step, within their share."""
        gain, spent = self.gain + fall, self.spent + cost
        better = fall * self.cost >= self.fall * cost and spent < self.share * self.cost
        return replace(self, gain=gain, spent=spent, wait=0 if better else 1)


_NESTED: dict[str, Any] = {
    "search": SearchState, "checks": CheckHistory, "draws": DrawHistory, "between": BetweenHistory,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Memory:
    """What one step leaves to the next.

    Plain numbers and one vector, so that a saved optimizer resumes exactly.

    Attributes:
        search: what the step search remembers.
        damping: λ relative to ``curvature_scale``.
        curvature_scale: c, at first |gᵀAg| / gᵀg at the first gradient, less where curvature has fallen by orders of
            magnitude; 0 before.
        safeguard: λ that is added, relative to ``curvature_scale``, where the strategies would repeat a rejected step.
        steps: steps taken.
        refusals: consecutive steps up to now whose loss or gradient was not finite.
        gradient_norm: ‖g‖ at the last point; 0 before the first.
        largest_gradient_norm: the largest ‖g‖ met; 0 before the first.
        loss: where the last step ended; nan before the first.
        full_steps: how many steps in a row, up to the last, were full Newton steps that the model foresaw.
        products: of the last step.
        progress: relative decrease of the loss in the last step; infinite before the first.
        probe_in: steps until the Hessian is tried in place of an approximation.
        probe_wait: how long to wait after its next failure.
        last_move: the last step, t d, (n,), where a strategy uses it; None before the first.
        column_norms: the largest norm so far of each column of a Jacobian, (n,), where a strategy uses it.
        previous: where the last accepted step began, (n,); None before the first.
        size: norm of the parameters where it ended, by which they are known again; nan before the first.
        reach: the longest ‖t d‖ that may be tried; infinite unless a step was taken back or rejected.
        failed: the shortest ‖t d‖ that failed, if the last step was rejected; else infinite.
        earlier: rows of earlier Jacobians, (m, n), where a strategy keeps them; None where there are none.
        weights: of the terms of the loss, (m,), where a strategy balances them.
        checks: the loss at other points, where steps are given one.
        draws: how steps have held at the points of the next, where those are new.
        between: how quasi-Newton steps between others have done.
    """

    search: SearchState
    damping: float
    curvature_scale: float = 0.0
    safeguard: float = 0.0
    steps: int = 0
    refusals: int = 0
    gradient_norm: float = 0.0
    largest_gradient_norm: float = 0.0
    loss: float = math.nan
    full_steps: int = 0
    products: int = 0
    progress: float = math.inf
    probe_in: int = 0
    probe_wait: int = 1
    last_move: Tensor | None = None
    column_norms: Tensor | None = None
    previous: Tensor | None = None
    size: float = math.nan
    reach: float = math.inf
    failed: float = math.inf
    earlier: Tensor | None = None
    weights: Tensor | None = None
    checks: CheckHistory = field(default_factory=CheckHistory)
    draws: DrawHistory = field(default_factory=DrawHistory)
    between: BetweenHistory = BetweenHistory()

    def meet(self, gradient_norm: float) -> Memory:
        """The memory at a new point with a finite gradient."""
        return replace(
            self,
            refusals=0,
            reach=RETREAT * self.reach,
            gradient_norm=gradient_norm,
            largest_gradient_norm=max(self.largest_gradient_norm, gradient_norm),
        )

    def at_rest(self, gradient_norm: float, tolerance: float) -> bool:
        """Whether ‖g‖ is within the tolerance: also of the largest met, where no gradient has been as large as 1."""
        return gradient_norm <= tolerance * min(1.0, max(self.largest_gradient_norm, gradient_norm))

    def safeguarded(self, before: Memory, accepted: bool) -> Memory:
        """The memory after a step, made such that the next step is another one if this one was not accepted."""
        if accepted:
            rest = self.safeguard / SAFEGUARD_DECAY
            return replace(self, safeguard=rest if rest >= SAFEGUARD / SAFEGUARD_GROWTH else 0.0)
        if self.damping != before.damping or self.search != before.search:
            return self
        return replace(self, safeguard=max(SAFEGUARD_GROWTH * self.safeguard, SAFEGUARD))

    def resumed(self) -> Memory:
        """The memory where a step begins on the batch of the last one: it goes on from where its trials have ended.

        Where curvature is all but absent the model's minimiser is too long by more than a step's trials make good.
        """
        return replace(self, reach=min(self.reach, self.failed))

    def retreated(self, length: float) -> Memory:
        """The memory where the last step, of ``length``, is taken back."""
        return replace(self, previous=None, size=math.nan, reach=length / RETREAT**2)  # the start met is to add one

    def probed(self, definite: bool | None) -> Memory:
        """The memory after a step that found the Hessian definite or not; None where it was not tried."""
        if definite is None:
            return replace(self, probe_in=max(self.probe_in - 1, 0))
        if definite:
            return replace(self, probe_in=0, probe_wait=1)
        return replace(self, probe_in=self.probe_wait, probe_wait=min(2 * self.probe_wait, LONGEST_WAIT))

    def within(self, mask: Tensor | None) -> Memory:
        """Without what earlier steps have left of the entries that are held fixed now: zeros of ``mask`` (n,)."""
        if mask is None:
            return self
        move, rows = (None if v is None else mask * v for v in (self.last_move, self.earlier))
        return replace(self, last_move=move, earlier=rows)

    def held(self, own: Callable[[Tensor], Tensor]) -> Memory:
        """With vectors as ``own`` keeps those that are the same in all processes."""
        vectors: dict[str, Any] = {name: own(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **vectors)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, tensors, and nested dictionaries."""
        return {**vars(self), **{name: asdict(getattr(self, name)) for name in _NESTED}}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Memory:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**state, **{name: kind(**state.get(name, {})) for name, kind in _NESTED.items()}})
