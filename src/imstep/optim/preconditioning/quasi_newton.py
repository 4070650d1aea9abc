"""Quasi-Newton matrices: an inverse Hessian learnt from the optimizer's own steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.linalg import (
    DenseOperator,
    IdentityOperator,
    LimitedMemoryPreconditioner,
    LinearOperator,
    bfgs_update,
    self_scaled_update,
    sr1_update,
)
from imstep.linalg.dots import norm_in_range
from imstep.linalg.quasi_newton import curved
from imstep.optim.preconditioning.base import OTHER_STATE, Evidence, Preconditioner, Preconditioning
from imstep.optim.preconditioning.recycling import inverse_size
from imstep.optim.record import Cost


@dataclass(frozen=True)
class QuasiNewton(Preconditioning):
    """A dense approximation H of the inverse Hessian, updated after every step s.

    H begins as yᵀs / yᵀy times the identity at the first s and the change y of the gradient along it; before, it is the
    identity divided by ‖g‖, so that the first step has length 1. After a step that was rejected it begins anew. Damping
    is not added to it.

    Args:
        exact: take y = A s, a product with the curvature where the step ends, in place of the difference of two
            gradients; it has no need of two steps on the same batch.
        limit: largest number of parameters, >= 1: H has the square of it.

    Cost: a product with H and two outer products a step.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), section 6.1 and (6.20); the first step's length is
        that of SciPy's BFGS.
    """

    exact: bool = False
    limit: int = 4096

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit, the largest number of parameters, is at least 1, got {self.limit}.")

    @abstractmethod
    def updated(self, inverse: Tensor, step: Tensor, change: Tensor, image: Callable[[], Tensor]) -> Tensor:
        """H after a step s, (n,), with its change y; ``image()`` is H⁻¹ s. A new tensor, or H itself."""

    def make(self, parameters: ParameterVector) -> Preconditioner:
        if parameters.size > self.limit:
            raise ValueError(
                f"{type(self).__name__} keeps a matrix of the parameters' number squared, and there are "
                f"{parameters.size:,} parameters; its limit is {self.limit:,}. Use LimitedMemoryBFGS(), or pass "
                f"limit={parameters.size}."
            )
        return _DenseInverse(self, parameters)


@dataclass(frozen=True)
class BFGS(QuasiNewton):
    """Broyden, Fletcher, Goldfarb and Shanno: see :func:`imstep.linalg.bfgs_update` and :class:`QuasiNewton`."""

    def updated(self, inverse: Tensor, step: Tensor, change: Tensor, image: Callable[[], Tensor]) -> Tensor:
        return bfgs_update(inverse, step, change)


@dataclass(frozen=True)
class SR1(QuasiNewton):
    """Symmetric rank one: see :func:`imstep.linalg.sr1_update` and :class:`QuasiNewton`.

    H may be indefinite; a direction that does not descend is then the gradient's, for a product.
    """

    def updated(self, inverse: Tensor, step: Tensor, change: Tensor, image: Callable[[], Tensor]) -> Tensor:
        return sr1_update(inverse, step, change)


@dataclass(frozen=True)
class SelfScaledBroyden(QuasiNewton):
    """Self-scaled Broyden: see :func:`imstep.linalg.self_scaled_update` and :class:`QuasiNewton`.

    Args:
        exact, limit: see :class:`QuasiNewton`.
        theta: the member of the family, by its θ; 0 for self-scaled BFGS, None for the θ of Al-Baali. In [0, 1].
    """

    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta <= 1:
            raise ValueError(f"theta, of Broyden's family, must lie in [0, 1], or be None; got {self.theta}.")

    def updated(self, inverse: Tensor, step: Tensor, change: Tensor, image: Callable[[], Tensor]) -> Tensor:
        return self_scaled_update(inverse, step, change, image(), self.theta)


@dataclass(frozen=True)
class LimitedMemoryBFGS(Preconditioning):
    """L-BFGS: the BFGS formula over the last steps, from a multiple of the identity.

    Args:
        pairs: how many steps count, >= 1: two vectors of memory for each.
        exact: see :class:`QuasiNewton`.

    Cost: four inner products or sums of vectors for each pair.

    Source: Liu and Nocedal, Mathematical Programming 45 (1989), 503-528; Nocedal and Wright, Numerical Optimization
        (2nd ed.), Algorithm 7.4 and (7.20).
    """

    pairs: int = 10
    exact: bool = False

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs, the number of steps that count, is at least 1, got {self.pairs}.")

    def make(self, parameters: ParameterVector) -> LimitedSecants:
        return _LimitedMemory(parameters, self.exact, self.pairs)


class Secant(Preconditioner):
    """Learns from steps s and changes y of the gradient."""

    def __init__(self, parameters: ParameterVector, exact: bool) -> None:
        self._parameters, self._exact = parameters, exact
        self._at: Tensor | None = None  # where the last step began, (n,)
        self._gradient: Tensor | None = None  # there; None where that was of another function

    @property
    def needs_products(self) -> bool:
        return self._exact

    @abstractmethod
    def take(self, step: Tensor, change: Tensor) -> None:
        """Learn from a step."""

    @abstractmethod
    def restart(self) -> None:
        """Drop what was learnt."""

    def refresh(self, evidence: Evidence) -> Cost:
        if not self.meet(self._parameters.get(), evidence.point.gradient, evidence.curvature):
            self.restart()  # the direction that H gave was of no use
        return Cost()

    def meet(self, here: Tensor, gradient: Tensor, curvature: LinearOperator | None = None) -> bool:
        """Learn from the step that has led here, where the gradient and, for exact changes, the curvature are these.

        Returns:
            Whether there was one, or it is the first point.
        """
        moved = True
        if self._at is not None:
            step = here - self._at
            moved = bool(step.any())
            if moved and self._exact and curvature is not None:
                self.take(step, curvature @ step)
            elif moved and self._gradient is not None:
                self.take(step, gradient - self._gradient)
        self._at, self._gradient = here, gradient
        return moved

    def forget(self) -> None:
        self._gradient = None

    def first(self) -> LinearOperator:
        """What makes a step of length 1 out of the gradient."""
        assert self._gradient is not None
        parameters, norm = self._parameters, norm_in_range(self._gradient)
        identity = IdentityOperator(parameters.size, dtype=parameters.dtype, device=parameters.device)
        return (1 / norm if norm > 0 else 1.0) * identity

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at, "at_gradient": self._gradient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._at, self._gradient = state["at"], state["at_gradient"]


class _DenseInverse(Secant):
    def __init__(self, kind: QuasiNewton, parameters: ParameterVector) -> None:
        super().__init__(parameters, kind.exact)
        self._kind = kind
        self._inverse: Tensor | None = None

    def take(self, step: Tensor, change: Tensor) -> None:
        if self._inverse is None:
            if not curved(step, change):
                return
            size = inverse_size([(step, change)], 0.0)
            self._inverse = size * torch.eye(len(step), dtype=step.dtype, device=step.device)
        inverse = self._inverse
        updated = self._kind.updated(inverse, step, change, lambda: self._image(inverse, step))
        self._inverse = updated if bool(updated.isfinite().all()) else None  # overflow, or H singular by rounding

    def _image(self, inverse: Tensor, step: Tensor) -> Tensor:
        """H⁻¹ s; a multiple of the last gradient g where s is one of H g."""
        if self._gradient is not None:
            direction = inverse @ self._gradient
            square = float(direction @ direction)
            t = float(step @ direction) / square if square > 0 else 0.0
            if float((step - t * direction).norm()) <= math.sqrt(torch.finfo(step.dtype).eps) * float(step.norm()):
                return t * self._gradient
        image: Tensor = torch.linalg.solve_ex(inverse, step).result
        return image

    def restart(self) -> None:
        self._inverse = None

    def operator(self, damping: float) -> LinearOperator | None:
        return self.first() if self._inverse is None else DenseOperator(self._inverse)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inverse_hessian": self._inverse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "inverse_hessian" not in state:
            raise ValueError(OTHER_STATE)
        super().load_state_dict(state)
        self._inverse = state["inverse_hessian"]


class LimitedSecants(Secant):
    """Keeps the last pairs (s, y)."""

    def __init__(self, parameters: ParameterVector, exact: bool, pairs: int) -> None:
        super().__init__(parameters, exact)
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=pairs)

    def state_dict(self) -> dict[str, Any]:
        pairs = [{"step": s, "change": y} for s, y in self._pairs]
        return {**super().state_dict(), "secants": pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "secants" not in state:
            raise ValueError(OTHER_STATE)
        super().load_state_dict(state)
        self._pairs.clear()
        self._pairs.extend((pair["step"], pair["change"]) for pair in state["secants"])


class _LimitedMemory(LimitedSecants):
    def take(self, step: Tensor, change: Tensor) -> None:
        if curved(step, change):
            self._pairs.append((step, change))

    def restart(self) -> None:
        self._pairs.clear()

    def operator(self, damping: float) -> LinearOperator | None:
        base = self.first()
        if self._pairs:
            size = inverse_size(reversed(self._pairs), damping)
            base = size * IdentityOperator.like(base)
        return LimitedMemoryPreconditioner(base, list(self._pairs), damping)
