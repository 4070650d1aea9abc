"""Energy natural gradients with SPRING's momentum, as published: nothing is searched for, no step is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from imstep.curvature import ResidualJacobian
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.ownership import KnownOwners
from imstep.curvature.parameters import ParameterVector
from imstep.optim.record import Cost
from imstep.runs.steppers import Stepper, StepResult
from imstep.tasks import AnyBatch, Problem


class Spring(torch.optim.Optimizer):
    """A fixed rate η, momentum μ and damping λ.

        v <- μ v - (JᵀJ + λI)⁻¹ Jᵀ(ρ + μ J v),   w <- w + η v

    Args:
        params: of the network.
        rate, momentum, damping: η, μ and λ.

    Cost: a Jacobian, and Cholesky's factorisation of JᵀJ or JJᵀ, whichever is smaller.

    Source: Goldshlager, Abrahamsen and Lin (arXiv 2401.10190); for physics-informed networks Guzmán-Cordero et al.
        (arXiv 2505.12149).
    """

    def __init__(self, params: Iterable[Tensor], rate: float, momentum: float, damping: float) -> None:
        super().__init__(params, {"lr": rate})
        self._momentum, self._damping = momentum, damping
        self._parameters = ParameterVector([p for group in self.param_groups for p in group["params"]])
        self._owners, self._move = KnownOwners(), torch.zeros_like(self._parameters.get())
        self.last_cost = Cost()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Move, unless the loss is not finite; returns the loss before."""
        frozen = FrozenClosure(closure, self._parameters)
        J = ResidualJacobian.at(frozen, self._parameters, self._owners)
        frozen.leave(accepted=True)
        self.last_cost = Cost(losses=J.evaluations, jacobian_passes=J.backward_passes)
        if bool(J.residuals.isfinite().all()):
            shift = self._momentum * self._move
            self._move = shift + natural_step(J, J.residuals + J @ shift, self._damping)
            self._parameters.set(self._parameters.get() + self.param_groups[0]["lr"] * self._move)
        return J.loss


def natural_step(jacobian: ResidualJacobian, residuals: Tensor, damping: float) -> Tensor:
    """-(JᵀJ + λI)⁻¹ Jᵀρ; where rounding asks for it, with a larger λ."""
    count, size = jacobian.shape
    if count < size:
        return -(jacobian.T @ _solved(jacobian.gram().dense(), residuals, damping))
    rows = jacobian.written_out()
    return -_solved(rows.mT @ rows, rows.mT @ residuals, damping)


def _solved(matrix: Tensor, rhs: Tensor, damping: float) -> Tensor:
    matrix.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(matrix)
    while int(info) and damping < 1e6:  # beyond, numbers are no longer finite
        matrix.diagonal().add_(9 * damping)
        damping *= 10
        factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(rhs[:, None], factor)[:, 0]


class SpringStepper(Stepper):
    """Says what a step costs."""

    def __init__(self, optimizer: Spring) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
        loss = float(self._optimizer.step(problem.closure(batch)))
        cost = self._optimizer.last_cost
        return StepResult(loss, cost.gradient_equivalents, losses=cost.losses)
