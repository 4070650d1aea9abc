"""Preconditioning by a matrix for each dimension of a parameter, learnt from gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.linalg import LinearOperator
from imstep.linalg.dots import unit_of
from imstep.optim.preconditioning.base import OTHER_STATE, Evidence, Preconditioner, Preconditioning
from imstep.optim.record import Cost


@dataclass
class Factors:
    """What is known of the gradients G of one parameter.

    Attributes:
        sides: a matrix (d, d) for each dimension; None where that is wider than the limit.
        turns: for each side what is made of it now and then: a root, or eigenvectors.
        squares: of the same shape as G; None where the sides are enough.
    """

    sides: list[Tensor | None]
    turns: list[Tensor | None] = field(default_factory=list)
    squares: Tensor | None = None

    @property
    def count(self) -> int:
        """How many sides there are."""
        return sum(side is not None for side in self.sides)


@dataclass(frozen=True)
class GradientFactors(Preconditioning):
    """A preconditioner with a matrix for each dimension of a parameter, from running means of its gradients.

    It costs no product, and knows layers only by their shapes, so that it serves any model and any loss. Its scale is
    not that of the curvature, so the damping stays out of it. Dimensions wider than ``largest`` have the identity; a
    parameter without any other has a diagonal of squared gradients.

    Args:
        decay: weight of the past in the running means, in [0, 1).
        every: steps between two decompositions of the matrices, >= 1; the first so many steps make one each.
        eps: least eigenvalue relative to the mean, > 0.
        largest: widest dimension with a matrix, >= 1: memory of its square, time of its cube.
    """

    decay: float = 0.95
    every: int = 10
    eps: float = 1e-6
    largest: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay, the weight of the past, must lie in [0, 1), got {self.decay}.")
        if self.every < 1 or self.largest < 1:
            raise ValueError(f"every and largest are at least 1, got {self.every} and {self.largest}.")
        if not self.eps > 0:
            raise ValueError(f"eps, the least relative eigenvalue, is positive, got {self.eps}.")

    def make(self, parameters: ParameterVector) -> GradientPreconditioner:
        return GradientPreconditioner(self, parameters)

    def begun(self, gradient: Tensor) -> Factors:
        """Before the first gradient; it has the shape of that."""
        narrow = [d if d <= self.largest else 0 for d in gradient.shape]
        return Factors([gradient.new_zeros(d, d) if d else None for d in narrow], [None for _ in narrow])

    @abstractmethod
    def take(self, factors: Factors, gradient: Tensor, step: int) -> None:
        """Learn from a gradient, that of the step of this number, from 0; tensors are replaced, not overwritten."""

    @abstractmethod
    def applied(self, factors: Factors, tensor: Tensor) -> Tensor:
        """P times a tensor."""

    def mean(self, old: Tensor | None, new: Tensor, step: int) -> Tensor:
        """The running mean from zero, corrected for its start as Adam's."""
        keep = self.decay * (1 - self.decay**step) / (1 - self.decay ** (step + 1))
        return new if old is None or keep == 0 else old.lerp(new, 1 - keep)

    def turned(self, step: int) -> bool:
        """Whether it is time for a decomposition; what few gradients have shown is soon out of date."""
        return step % self.every == 0 or step < self.every

    def diagonal(self, factors: Factors, tensor: Tensor) -> Tensor:
        """P of a parameter without matrices."""
        assert factors.squares is not None
        floor = self.eps * factors.squares.mean()
        scale = (factors.squares + floor).sqrt()
        return tensor / torch.where(scale > 0, scale, 1.0)


class GradientPreconditioner(Preconditioner):
    """What a :class:`GradientFactors` has learnt of the parameters of an optimizer."""

    def __init__(self, kind: GradientFactors, parameters: ParameterVector) -> None:
        self._kind, self._parameters, self._steps = kind, parameters, 0
        self._factors: list[Factors] = []
        self._unit = 1.0  # of gradients, whose squares may leave the range of their dtype

    @property
    def needs_products(self) -> bool:
        return False

    def refresh(self, evidence: Evidence) -> Cost:
        self.take(evidence.point.gradient)
        return Cost()

    def take(self, gradient: Tensor) -> None:
        """Learn from a gradient (n,); from none whose squares are not finite."""
        if self._steps == 0:
            self._unit = unit_of(gradient)
        gradient = self._unit * gradient
        if not bool((gradient @ gradient).isfinite()):
            return
        views = self._parameters.views(gradient)
        self._factors = self._factors or [self._kind.begun(g) for g in views]
        for factors, g in zip(self._factors, views, strict=True):
            if g.numel():
                self._kind.take(factors, g, self._steps)
        self._steps += 1

    def operator(self, damping: float) -> LinearOperator | None:
        return _Operator(self._kind, self._parameters, self._factors, self._unit) if self._steps else None

    def state_dict(self) -> dict[str, Any]:
        saved = [{name: _copied(value) for name, value in vars(f).items()} for f in self._factors]
        return {"rule": type(self._kind).__name__, "steps": self._steps, "unit": self._unit, "tensors": saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("rule") != type(self._kind).__name__:
            raise ValueError(OTHER_STATE)
        self._steps, self._unit = state["steps"], state.get("unit", 1.0)  # older states had no other
        self._factors = [Factors(**{name: _copied(v) for name, v in saved.items()}) for saved in state["tensors"]]


class _Operator(LinearOperator):
    """P of all parameters, each by itself."""

    def __init__(
        self, kind: GradientFactors, parameters: ParameterVector, factors: Sequence[Factors], unit: float
    ) -> None:
        super().__init__(parameters.size, parameters.dtype, parameters.device)
        self._kind, self._parameters, self._factors, self._unit = kind, parameters, factors, unit

    def matvec(self, vector: Tensor) -> Tensor:
        pairs = zip(self._factors, self._parameters.views(self._unit * vector), strict=True)
        applied = [self._kind.applied(f, t) if t.numel() else t for f, t in pairs]
        return torch.cat([t.reshape(-1) for t in applied])


def _copied(value: Any) -> Any:
    """Lists are, since they change; the tensors in them do not."""
    return list(value) if isinstance(value, list) else value


def rows_of(t: Tensor, at: int) -> Tensor:
    """(d, rest): a dimension first."""
    return t.movedim(at, 0).reshape(t.shape[at], -1)


def multiplied(t: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """The tensor multiplied by a matrix along each dimension; contiguous, as it comes back from a file."""
    for at, matrix in enumerate(matrices):
        if matrix is not None:  # at the last dimension without copies
            last = at == t.ndim - 1
            t = t @ matrix.mT if last else torch.tensordot(matrix, t, dims=([1], [at])).movedim(0, at)
    return t.contiguous()
