"""Preconditioning by factors for each dimension of a parameter, learnt from gradients: Shampoo, SOAP and KL-Shampoo."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.linalg import LinearOperator
from imstep.optim.preconditioning.base import OTHER_STATE, Evidence, Preconditioner, Preconditioning
from imstep.optim.record import Cost

_WHOLE = torch.float64


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
        return new if old is None or keep == 0 else keep * old + (1 - keep) * new

    def turned(self, step: int) -> bool:
        """Whether it is time for a decomposition; what few gradients have shown is soon out of date."""
        return step % self.every == 0 or step < self.every

    def diagonal(self, factors: Factors, tensor: Tensor) -> Tensor:
        """P of a parameter without matrices."""
        assert factors.squares is not None
        floor = self.eps * factors.squares.mean()
        scale = (factors.squares + floor).sqrt()
        return tensor / torch.where(scale > 0, scale, 1.0)


@dataclass(frozen=True)
class Shampoo(GradientFactors):
    """Shampoo: the roots of second moments of a gradient's rows and columns.

        P: G -> L^(-1/4) G R^(-1/4),   L = Σ G Gᵀ,   R = Σ Gᵀ G;   for k dimensions the powers are -1/(2k)

    Args:
        decay, every, eps, largest: see :class:`GradientFactors`.
        sums: whether gradients are added up for good, as in the paper, and ``decay`` is not used: steps then shorten by
            themselves.

    Source: Gupta, Koren and Singer, ICML 2018 (arXiv 1802.09568), Algorithms 1 and 2; means in place of sums as Anil et
        al., arXiv 2002.09018. Their ε is absolute, and so has the unit of a squared gradient.
    """

    eps: float = 1e-4
    sums: bool = False

    def mean(self, old: Tensor | None, new: Tensor, step: int) -> Tensor:
        if self.sums:
            return new if old is None else old + new
        return super().mean(old, new, step)

    def take(self, factors: Factors, gradient: Tensor, step: int) -> None:
        if not factors.count:
            factors.squares = self.mean(factors.squares, gradient.square(), step)
            return
        for at, side in enumerate(factors.sides):
            if side is not None:
                rows = _rows(gradient, at)
                factors.sides[at] = side = self.mean(side, rows @ rows.mT, step)
                if self.turned(step):
                    factors.turns[at] = _power(side, -1 / (2 * factors.count), self.eps)

    def applied(self, factors: Factors, tensor: Tensor) -> Tensor:
        return _turn(tensor, factors.turns) if factors.count else self.diagonal(factors, tensor)


@dataclass(frozen=True)
class KLShampoo(GradientFactors):
    """KL-Shampoo: as Shampoo, with each side's moments weighted by the inverse of the other's.

        P: G -> S_a^(-1/2) G S_b^(-1/2),   S_a = E[G S_b⁻¹ Gᵀ] / d_b,   S_b = E[Gᵀ S_a⁻¹ G] / d_a

    S_a ⊗ S_b is the covariance of that form which is nearest to E[g gᵀ] in Kullback-Leibler divergence, so that P g is
    near to white, with entries of size 1 whatever the shape.

    Args:
        decay, every, eps, largest: see :class:`GradientFactors`; inverses are as old as the decompositions.

    Source: Lin, Lowe, Dangel, Eschenhagen, Xu and Grosse, arXiv 2509.03378. The means begin with multiples of the
        identity that make up the mean square of the first gradient, so that no unit matters.
    """

    def take(self, factors: Factors, gradient: Tensor, step: int) -> None:
        count = factors.count
        if not count:
            factors.squares = self.mean(factors.squares, gradient.square(), step)
            return
        if step == 0:
            size = float(gradient.square().mean()) ** (1 / count) or 1.0
            start = [None if side is None else torch.eye(len(side)).to(side) for side in factors.sides]
            factors.sides = [None if eye is None else size * eye for eye in start]
            factors.turns = [None if eye is None else size**-0.5 * eye for eye in start]
        white = [self._moment(gradient, factors, at) for at in range(gradient.ndim)]
        for at, (side, moment) in enumerate(zip(factors.sides, white, strict=True)):
            if side is not None and moment is not None:
                factors.sides[at] = self.decay * side + (1 - self.decay) * moment
        if self.turned(step):
            factors.turns = [None if side is None else _power(side, -0.5, self.eps) for side in factors.sides]

    def _moment(self, gradient: Tensor, factors: Factors, at: int) -> Tensor | None:
        if factors.sides[at] is None:
            return None
        others = [None if number == at else turn for number, turn in enumerate(factors.turns)]
        rows = _rows(_turn(gradient, others), at)
        return rows @ rows.mT / max(rows.shape[1], 1)

    def applied(self, factors: Factors, tensor: Tensor) -> Tensor:
        return _turn(tensor, factors.turns) if factors.count else self.diagonal(factors, tensor)


@dataclass(frozen=True)
class SOAP(GradientFactors):
    """SOAP: Adam's second moments in the eigenvectors of Shampoo's matrices.

        P: G -> Q_L ((Q_LᵀG Q_R) / (√v + ε)) Q_Rᵀ,   v = E[(Q_LᵀG Q_R)²]

    A parameter of one dimension, or none, has Adam's own diagonal.

    Args:
        decay: of the matrices and of v, in [0, 1).
        every, largest: see :class:`GradientFactors`.
        eps: ε relative to the root of the mean of v, > 0.

    Source: Vyas et al., ICLR 2025 (arXiv 2409.11321), Algorithm 3, and its numbers. Eigenvectors are computed anew in
        place of a step of power iteration from the last ones, and v follows them as the diagonal of the matrix that it
        was; as in the paper, they are of the gradients before the present one, but for the first.
    """

    eps: float = 1e-8

    def begun(self, gradient: Tensor) -> Factors:
        factors = super().begun(gradient)
        return factors if gradient.ndim > 1 else Factors([None] * gradient.ndim, [None] * gradient.ndim)

    def take(self, factors: Factors, gradient: Tensor, step: int) -> None:
        if step == 0:
            self._moments(factors, gradient, step)
        if self.turned(step):
            self._turn(factors)
        inside = _turn(gradient, [None if turn is None else turn.mT for turn in factors.turns])
        factors.squares = self.mean(factors.squares, inside.square(), step)
        if step > 0:
            self._moments(factors, gradient, step)

    def _moments(self, factors: Factors, gradient: Tensor, step: int) -> None:
        for at, side in enumerate(factors.sides):
            if side is not None:
                rows = _rows(gradient, at)
                factors.sides[at] = self.mean(side, rows @ rows.mT, step)

    def _turn(self, factors: Factors) -> None:
        for at, side in enumerate(factors.sides):
            if side is None:
                continue
            old, new = factors.turns[at], torch.linalg.eigh(side.to(_WHOLE))[1].to(side.dtype).contiguous()
            if factors.squares is not None and old is not None:
                share: list[Tensor | None] = [None] * len(factors.sides)
                share[at] = (new.mT @ old).square()
                factors.squares = _turn(factors.squares, share)
            factors.turns[at] = new

    def applied(self, factors: Factors, tensor: Tensor) -> Tensor:
        assert factors.squares is not None
        inside = _turn(tensor, [None if turn is None else turn.mT for turn in factors.turns])
        root = factors.squares.sqrt()
        scale = root + self.eps * factors.squares.mean().sqrt()
        return _turn(inside / torch.where(scale > 0, scale, 1.0), factors.turns)


class GradientPreconditioner(Preconditioner):
    """What a :class:`GradientFactors` has learnt of the parameters of an optimizer."""

    def __init__(self, kind: GradientFactors, parameters: ParameterVector) -> None:
        self._kind, self._parameters, self._steps = kind, parameters, 0
        self._factors: list[Factors] = []

    @property
    def needs_products(self) -> bool:
        return False

    def refresh(self, evidence: Evidence) -> Cost:
        self.take(evidence.point.gradient)
        return Cost()

    def take(self, gradient: Tensor) -> None:
        """Learn from a gradient (n,); from none whose squares are not finite."""
        if not bool((gradient @ gradient).isfinite()):
            return
        views = self._parameters.views(gradient)
        self._factors = self._factors or [self._kind.begun(g) for g in views]
        for factors, g in zip(self._factors, views, strict=True):
            if g.numel():
                self._kind.take(factors, g, self._steps)
        self._steps += 1

    def operator(self, damping: float) -> LinearOperator | None:
        return _Operator(self._kind, self._parameters, self._factors) if self._steps else None

    def state_dict(self) -> dict[str, Any]:
        saved = [{name: _copied(value) for name, value in vars(f).items()} for f in self._factors]
        return {"rule": type(self._kind).__name__, "steps": self._steps, "tensors": saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("rule") != type(self._kind).__name__:
            raise ValueError(OTHER_STATE)
        self._steps = state["steps"]
        self._factors = [Factors(**{name: _copied(v) for name, v in saved.items()}) for saved in state["tensors"]]


class _Operator(LinearOperator):
    """P of all parameters, each by itself."""

    def __init__(self, kind: GradientFactors, parameters: ParameterVector, factors: Sequence[Factors]) -> None:
        super().__init__(parameters.size, parameters.dtype, parameters.device)
        self._kind, self._parameters, self._factors = kind, parameters, factors

    def matvec(self, vector: Tensor) -> Tensor:
        pairs = zip(self._factors, self._parameters.views(vector), strict=True)
        applied = [self._kind.applied(f, t) if t.numel() else t for f, t in pairs]
        return torch.cat([t.reshape(-1) for t in applied])


def _copied(value: Any) -> Any:
    """Lists are, since they change; the tensors in them do not."""
    return list(value) if isinstance(value, list) else value


def _rows(t: Tensor, at: int) -> Tensor:
    """(d, rest): a dimension first."""
    return t.movedim(at, 0).reshape(t.shape[at], -1)


def _turn(t: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """The tensor multiplied by a matrix along each dimension; contiguous, as it comes back from a file."""
    for at, matrix in enumerate(matrices):
        if matrix is not None:
            t = torch.tensordot(matrix, t, dims=([1], [at])).movedim(0, at)
    return t.contiguous()


def _power(matrix: Tensor, power: float, eps: float) -> Tensor:
    """(M + eps mean(M) I)^power of a positive semidefinite M; of a vanishing one the identity."""
    values, vectors = torch.linalg.eigh(matrix.to(_WHOLE))
    values = values.clamp(min=0)
    mean = values.mean()
    values = torch.where(mean > 0, values + eps * mean, 1.0)
    return ((vectors * values**power) @ vectors.mT).to(matrix.dtype).contiguous()
