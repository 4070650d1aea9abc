"""Solvers of a step beyond conjugate gradients: cubic terms, sizes of eigenvalues, planes, preconditioners alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from imstep.linalg import (
    KrylovStatus,
    cubic_regularization,
    dense_cubic_regularization,
    dogleg,
    saddle_free,
    two_dimensional_subspace,
)
from imstep.linalg.result import measured_result
from imstep.optim.direction import Direction, descent
from imstep.optim.solving import ConjugateGradient, GeneralizedLanczos, NewtonSystem, Solver, in_ball


@dataclass(frozen=True)
class CubicRegularization(Solver):
    """The minimiser of gᵀd + dᵀ(A + λI)d/2 + σ‖d‖³/3 over a Krylov space; the step search gives σ.

    With :class:`~imstep.globalization.AdaptiveCubic` it is the ARC method; with
    :class:`~imstep.globalization.TaylorMonitor`, σ is half the third derivative that the monitor measures. Before there
    is a σ, as :class:`ConjugateGradient`.

    Args:
        exact: up to this number of parameters the matrix itself is decomposed, for n products; >= 0.

    Source: Cartis, Gould and Toint, Mathematical Programming 127 (2011), 245-295; Nesterov and Polyak, Mathematical
        Programming 108 (2006), 177-205.
    """

    exact: int = 32

    def __post_init__(self) -> None:
        if self.exact < 0:
            raise ValueError(f"exact, a number of parameters, is at least 0, got {self.exact}.")

    def solve(self, system: NewtonSystem) -> Direction:
        if not 0 < system.sigma < math.inf:
            return ConjugateGradient().solve(system)
        operator, rhs = system.operator, -system.gradient
        if operator.size <= self.exact:
            result = dense_cubic_regularization(operator, rhs, system.sigma, damping=system.damping)
        else:
            result = cubic_regularization(
                operator,
                rhs,
                system.sigma,
                damping=system.damping,
                preconditioner=system.preconditioner,
                stopping=system.stopping,
            )
        return descent(operator, system.gradient, result)


@dataclass(frozen=True)
class SaddleFree(Solver):
    """-(|A| + λI)⁻¹ g over a Krylov space: eigenvalues count by their sizes.

    Args:
        dimension: of the space, at most; >= 1.

    Source: Dauphin et al., NeurIPS 2014 (arXiv 1406.2572), Algorithm 1.
    """

    dimension: int = 64

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"dimension, of the Krylov space, is at least 1, got {self.dimension}.")

    def solve(self, system: NewtonSystem) -> Direction:
        result = saddle_free(
            system.operator,
            -system.gradient,
            damping=system.damping,
            stopping=system.stopping,
            dimension=self.dimension,
        )
        return descent(system.operator, system.gradient, result)


@dataclass(frozen=True)
class Dogleg(Solver):
    """The dogleg path within the step search's radius; before there is a radius, as :class:`ConjugateGradient`.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), section 4.1.
    """

    def solve(self, system: NewtonSystem) -> Direction:
        return in_ball(dogleg, system)


@dataclass(frozen=True)
class TwoDimensionalSubspace(Solver):
    """The best step within the radius in the plane of the gradient and Newton's direction.

    Before there is a radius, as :class:`ConjugateGradient`.

    Source: Byrd, Schnabel and Shultz, Mathematical Programming 40 (1988), 247-263.
    """

    def solve(self, system: NewtonSystem) -> Direction:
        return in_ball(two_dimensional_subspace, system)


@dataclass(frozen=True)
class PreconditionedGradient(Solver):
    """-α P g: a step of the preconditioner alone, as long as the exact curvature along it says.

        d = -P g,   α = -gᵀd / (|dᵀAd| + λ‖d‖²)

    With ``momentum=True`` of the optimizer, length and share of the last step come from the exact model together.

    Args:
        products: whether there is such a product, one a step. Without, the model is P's own, (A + λI) d = -g, so that
            α = 1: a quasi-Newton step. With ``curvature=ExactHessian()`` and no damping a step then evaluates plain
            gradients only.

    Source: Martens and Grosse, ICML 2015 (arXiv 1503.05671), sections 6.4 and 7, for Kronecker factors; Nocedal and
        Wright, Numerical Optimization (2nd ed.), chapter 6, without products.
    """

    products: bool = True

    @property
    def needs_products(self) -> bool:
        return self.products

    def solve(self, system: NewtonSystem) -> Direction:
        b = -system.gradient
        direction = b if system.preconditioner is None else system.preconditioner.matvec(b)
        image = system.operator.matvec(direction) if self.products else b - system.damping * direction
        slope = float(b @ direction)
        along, square = float(direction @ image), float(direction @ direction)
        curvature = along + system.damping * square
        share = _length(slope, abs(along) + system.damping * square if self.products else curvature, square)
        solution, product = share * direction, share * image
        residual = b - product - system.damping * solution
        result = measured_result(
            system.damping,
            solution,
            product,
            status=KrylovStatus.MAX_ITERATIONS,
            iterations=1,
            products=int(self.products),
            residual_norm=float(residual.norm()),
            decreases=(0.0, share * slope - share * share * curvature / 2),
        )
        return descent(system.operator, system.gradient, result)


@dataclass(frozen=True)
class LearntModel(Solver):
    """Another solver on the matrix B that a quasi-Newton method has learnt, in place of the curvature: no products.

    It belongs with ``preconditioning=RankOneModel()``, and with a step search that has a radius, since B may be
    indefinite. With ``curvature=ExactHessian()`` and no damping a step then evaluates plain gradients only.

    Args:
        solver: of the subproblem.

    Raises:
        ValueError: at a step: the preconditioning learns no such matrix.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 6.2. A Krylov space that B = γI and k
        rank-one terms span has at most k + 2 dimensions, so that GLTR ends there with the exact step.
    """

    solver: Solver = field(default_factory=GeneralizedLanczos)

    @property
    def needs_products(self) -> bool:
        return False

    def solve(self, system: NewtonSystem) -> Direction:
        if system.model is None:
            raise ValueError(
                "LearntModel() solves with a matrix that the preconditioning learns, and this one learns none. Pass "
                "preconditioning=RankOneModel(), or solver=GeneralizedLanczos() for the curvature itself."
            )
        return self.solver.solve(replace(system, operator=system.model, preconditioner=None))


def _length(slope: float, size: float, square: float) -> float:
    """The share of a direction that a curvature of this size makes its length; all of it where that says nothing."""
    share = slope / size if size > 0 else math.inf
    return share if 0 < share * math.sqrt(square) < math.inf else 1.0
