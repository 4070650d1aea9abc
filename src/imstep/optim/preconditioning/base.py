"""How a Krylov iteration is preconditioned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imstep.curvature.layers import LayerObserver
from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised
from imstep.linalg import LinearOperator
from imstep.optim.record import Cost

OTHER_STATE = "the state was saved with another preconditioning. Give the optimizer the same strategies before loading."


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a preconditioner can learn from at the start of a step.

    Attributes:
        point: loss, gradient and record; with autograd's graph if the preconditioner has observed the evaluation.
        observer: what the preconditioner gave to watch the evaluation, if anything.
        curvature: the matrix A of the step; its products are counted by itself.
        damping: λ.
    """

    point: Linearised
    observer: LayerObserver | None
    curvature: LinearOperator
    damping: float


class Preconditioner(ABC):
    """A preconditioner that lives as long as an optimizer; made by a :class:`Preconditioning`."""

    def observer(self) -> LayerObserver | None:
        """What should watch the evaluation of this step; None if nothing."""
        return None

    @abstractmethod
    def refresh(self, evidence: Evidence) -> Cost:
        """Learn from the start of a step, if it is time to; returns the cost apart from products with A."""

    @abstractmethod
    def operator(self, damping: float) -> LinearOperator | None:
        """P ≈ (A + damping I)⁻¹, or None."""

    def model(self) -> LinearOperator | None:
        """B ≈ A, learnt, for a solver that works on it in place of A; None where it learns none."""
        return None

    @property
    def needs_products(self) -> bool:
        """Whether it multiplies with the curvature as a rule; if not, a step may do without its record."""
        return True

    @property
    def pairs_wanted(self) -> int:
        """How many directions with their products it learns from, at most."""
        return 0

    def learn(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:  # noqa: B027 (most learn nothing from them)
        """Take in directions p and products A p, (n,) each, that the solver of a step has met; oldest first."""

    def forget(self) -> None:  # noqa: B027 (most have learnt nothing)
        """Drop what was learnt from products, because the step is on another function: the loss of another batch."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (stateless ones have nothing to load)
        """The inverse of :meth:`state_dict`."""


class Preconditioning(ABC):
    """A kind of preconditioner, for the parameters of one optimizer."""

    @abstractmethod
    def make(self, parameters: ParameterVector) -> Preconditioner:
        """A fresh preconditioner."""


@dataclass(frozen=True)
class NoPreconditioning(Preconditioning):
    """Plain Krylov iterations."""

    def make(self, parameters: ParameterVector) -> Preconditioner:
        return _None()


class _None(Preconditioner):
    @property
    def needs_products(self) -> bool:
        return False

    def refresh(self, evidence: Evidence) -> Cost:
        return Cost()

    def operator(self, damping: float) -> LinearOperator | None:
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(OTHER_STATE)
