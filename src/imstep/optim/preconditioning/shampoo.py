"""Shampoo, SOAP and KL-Shampoo: what they make of a parameter's gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.optim.preconditioning.gradient_factors import Factors, GradientFactors, multiplied, rows_of

_WHOLE = torch.float64


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

    eps: float = 1e-2
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
                rows = rows_of(gradient, at)
                factors.sides[at] = side = self.mean(side, rows @ rows.mT, step)
                if self.turned(step):
                    factors.turns[at] = _power(side, -1 / (2 * factors.count), self.eps)

    def applied(self, factors: Factors, tensor: Tensor) -> Tensor:
        return multiplied(tensor, factors.turns) if factors.count else self.diagonal(factors, tensor)


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
        rows = rows_of(multiplied(gradient, others), at)
        return rows @ rows.mT / max(rows.shape[1], 1)

    def applied(self, factors: Factors, tensor: Tensor) -> Tensor:
        return multiplied(tensor, factors.turns) if factors.count else self.diagonal(factors, tensor)


@dataclass(frozen=True)
class SOAP(GradientFactors):
    """SOAP: Adam's second moments in the eigenvectors of Shampoo's matrices.

        P: G -> Q_L ((Q_LᵀG Q_R) / (√v + ε)) Q_Rᵀ,   v = E[(Q_LᵀG Q_R)²]

    A parameter of one dimension, or none, has Adam's own diagonal.

    Args:
        decay: of the matrices and of v, in [0, 1).
        every, largest: see :class:`GradientFactors`.
        eps: ε relative to the root of the mean of v, > 0.

    Source: Vyas et al., ICLR 2025 (arXiv 2409.11321), Algorithms 3 and 4, and their numbers: after the first ones
        eigenvectors are followed by a step of power iteration, and are of the gradients before the present one. Ours is
        that v follows them as the diagonal of the matrix that it was.
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
        inside = multiplied(gradient, [None if turn is None else turn.mT for turn in factors.turns])
        factors.squares = self.mean(factors.squares, inside.square(), step)
        if step > 0:
            self._moments(factors, gradient, step)

    def _moments(self, factors: Factors, gradient: Tensor, step: int) -> None:
        for at, side in enumerate(factors.sides):
            if side is not None:
                rows = rows_of(gradient, at)
                factors.sides[at] = self.mean(side, rows @ rows.mT, step)

    def _turn(self, factors: Factors) -> None:
        for at, side in enumerate(factors.sides):
            if side is None:
                continue
            old = factors.turns[at]
            new = _followed(side, old)
            if factors.squares is not None and old is not None:
                share: list[Tensor | None] = [None] * len(factors.sides)
                share[at] = (new.mT @ old).square()
                factors.squares = multiplied(factors.squares, share)
            factors.turns[at] = new

    def applied(self, factors: Factors, tensor: Tensor) -> Tensor:
        assert factors.squares is not None
        inside = multiplied(tensor, [None if turn is None else turn.mT for turn in factors.turns])
        root = factors.squares.sqrt()
        scale = root + self.eps * factors.squares.mean().sqrt()
        return multiplied(inside / torch.where(scale > 0, scale, 1.0), factors.turns)


def _followed(matrix: Tensor, vectors: Tensor | None) -> Tensor:
    """Eigenvectors of a positive semidefinite matrix; of those that it had before, a step of power iteration."""
    if vectors is None:
        return torch.linalg.eigh(matrix.to(_WHOLE))[1].to(matrix.dtype).flip(1).contiguous()
    images = matrix @ vectors
    largest_first = (vectors * images).sum(0).argsort(descending=True)
    return torch.linalg.qr(images[:, largest_first])[0].contiguous()


def _power(matrix: Tensor, power: float, eps: float) -> Tensor:
    """(M + eps mean(M) I)^power of a positive semidefinite M; of a vanishing one the identity."""
    values, vectors = torch.linalg.eigh(matrix.to(_WHOLE))
    values = values.clamp(min=0)
    mean = values.mean()
    values = torch.where(mean > 0, values + eps * mean, 1.0)
    return ((vectors * values**power) @ vectors.mT).to(matrix.dtype).contiguous()
