"""How the Newton system of a step is solved: exchangeable solvers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector
from imstep.curvature.pieces import Linearised
from imstep.linalg import (
    AbsoluteEigenvalues,
    IndefiniteRule,
    KrylovResult,
    KrylovStatus,
    LinearOperator,
    NoiseTest,
    StoppingRule,
    blended_conjugate_gradient,
    conjugate_gradient,
    dense_solve,
    dense_trust_region,
    gltr,
    minres,
    steihaug_toint,
)
from imstep.linalg.dots import dots, norm_in_range
from imstep.optim.backtracking import IterateBacktracking
from imstep.optim.direction import Direction, descent
from imstep.optim.masked import masked


@dataclass(frozen=True, eq=False)
class NewtonSystem:
    """The damped Newton system (A + λI) d = -g of a step.

    Attributes:
        operator: A; also tells the curvatures of the two halves of the batch if the solver asked for them.
        gradient: g, (n,).
        damping: λ >= 0.
        preconditioner: P ≈ (A + λI)⁻¹, or None.
        keep_pairs: how many directions with their products are to be returned, at most.
        stopping: the rules that say when the solution is accurate enough.
        radius: Δ of the step search, a bound on ‖d‖ that a solver may respect; infinite where there is none.
        last_move: the last step, (n,); None before the first, and where the solver makes no use of it.
        point: loss, gradient and record at the point; with the loss's graph if the solver asked for it.
        parameters: the vector that all of this is about.
        sigma: σ of a cubic term σ‖d‖³/3 that a solver may add to the model, by the step search; 0 where there is none.
        third_derivative: (u, v) -> D³f[u, v, ·], (n,) each, of the loss that the curvature is taken from.
        model: B ≈ A that the preconditioner has learnt, for solvers that work on it in place of A; or None.
        step: the number of the step, from 0.
        mask: zeros for the entries (n,) that are held fixed, as in g and P; None where none is.
    """

    operator: LinearOperator
    gradient: Tensor
    damping: float
    preconditioner: LinearOperator | None
    keep_pairs: int
    stopping: tuple[StoppingRule, ...]
    radius: float
    last_move: Tensor | None
    point: Linearised
    parameters: ParameterVector
    sigma: float = 0.0
    third_derivative: Callable[[Tensor, Tensor], Tensor] | None = None
    model: LinearOperator | None = None
    step: int = 0
    mask: Tensor | None = None


class Solver(ABC):
    """Finds the direction of a step."""

    @property
    def needs_halves(self) -> bool:
        """Whether its operator must tell the curvatures of the two halves of the batch."""
        return False

    @property
    def needs_graph(self) -> bool:
        """Whether it differentiates the loss further, so that autograd's graph must survive the evaluation."""
        return self.needs_halves

    @property
    def needs_products(self) -> bool:
        """Whether it multiplies with the curvature as a rule; if not, a step records its derivative only on demand."""
        return True

    @property
    def uses_last_move(self) -> bool:
        """Whether it makes use of the last step, which is then kept."""
        return False

    @property
    def chooses(self) -> IterateBacktracking | None:
        """How one of its iterates is chosen by the loss there; None where the last one is the direction."""
        return None

    @abstractmethod
    def solve(self, system: NewtonSystem) -> Direction:
        """A direction of descent."""


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients, ended by the first disturbing direction.

    If that is the very first direction, it becomes the direction of the step, as long as if its curvature had the other
    sign.

    Args:
        curvature_floor: least curvature per ‖p‖² of a direction p that does not disturb, >= 0.
        noise: also directions disturb whose curvature cannot be told from mini-batch noise; None for no such test.
            Needs a loss with a convex end.
        follow: where a direction p of negative curvature ends the iteration, add the step along p that its curvature's
            absolute value suggests, rather than leave p alone.
        warm_start: fraction of the last step that the iteration starts from, in [0, 1]; 0 for a start at zero.
        backtracking: which of the iterates becomes the direction; None for the last.

    Source: Shen et al., arXiv 2009.07098, for the termination; the absolute value as Dauphin et al., NeurIPS 2014
        (arXiv 1406.2572); warm starts as Martens, ICML 2010, section 4.5.
    """

    curvature_floor: float = 0.0
    noise: NoiseTest | None = None
    follow: bool = False
    warm_start: float = 0.0
    backtracking: IterateBacktracking | None = None

    def __post_init__(self) -> None:
        if not self.curvature_floor >= 0:
            raise ValueError(f"curvature_floor is at least 0, got {self.curvature_floor}.")
        if not 0 <= self.warm_start <= 1:
            raise ValueError(f"warm_start, a fraction of the last step, must lie in [0, 1], got {self.warm_start}.")

    @property
    def needs_halves(self) -> bool:
        return self.noise is not None

    @property
    def uses_last_move(self) -> bool:
        return self.warm_start > 0

    @property
    def chooses(self) -> IterateBacktracking | None:
        return self.backtracking

    def solve(self, system: NewtonSystem) -> Direction:
        result = conjugate_gradient(
            system.operator,
            -system.gradient,
            damping=system.damping,
            preconditioner=system.preconditioner,
            stopping=system.stopping,
            curvature_floor=self.curvature_floor,
            noise=self.noise,
            x0=None if system.last_move is None else self.warm_start * system.last_move,
            keep_pairs=system.keep_pairs,
            keep_iterates=None if self.backtracking is None else self.backtracking.growth,
        )
        if self.follow and result.iterations > 0 and result.status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE:
            result = _followed(system, result)
        return descent(system.operator, system.gradient, _led_on(system, result))


@dataclass(frozen=True)
class BlendedConjugateGradient(Solver):
    """Conjugate gradients on a blend of the batch's curvature A and what the preconditioner P has averaged over many.

        ((1-w)(A + λI) + w P⁻¹) d = -g

    Without a preconditioner, as :class:`ConjugateGradient`.

    Args:
        weight: w in [0, 1), the share of P⁻¹.

    Source: our choice; see :func:`imstep.linalg.blended_conjugate_gradient`.
    """

    weight: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.weight < 1:
            raise ValueError(f"weight, the share of the preconditioner, must lie in [0, 1), got {self.weight}.")

    def solve(self, system: NewtonSystem) -> Direction:
        if system.preconditioner is None:
            return ConjugateGradient().solve(system)
        result = blended_conjugate_gradient(
            system.operator,
            -system.gradient,
            system.preconditioner,
            weight=self.weight,
            damping=system.damping,
            stopping=system.stopping,
            keep_pairs=system.keep_pairs,
        )
        return descent(system.operator, system.gradient, _led_on(system, result))


@dataclass(frozen=True)
class MinimalResidual(Solver):
    """Minimal residuals, ended by the first direction of negative curvature.

    If that is the very first residual's, it becomes the direction of the step. Against conjugate gradients the model
    falls less per product, the residual more; stopping rules on the model's decrease serve both.

    Args:
        curvature_floor: least curvature per ‖p‖² of a direction p that does not disturb, >= 0.

    Source: Liu and Roosta, SIAM J. Optim. 32 (2022), arXiv 2206.05732.
    """

    curvature_floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.curvature_floor >= 0:
            raise ValueError(f"curvature_floor is at least 0, got {self.curvature_floor}.")

    def solve(self, system: NewtonSystem) -> Direction:
        result = minres(
            system.operator,
            -system.gradient,
            damping=system.damping,
            preconditioner=system.preconditioner,
            stopping=system.stopping,
            curvature_floor=self.curvature_floor,
        )
        return descent(system.operator, system.gradient, _led_on(system, result))


@dataclass(frozen=True)
class SteihaugToint(Solver):
    """Conjugate gradients within the step search's radius Δ, on to its boundary along negative curvature.

    Before there is a radius, as :class:`ConjugateGradient`.

    Source: Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithm 7.2.
    """

    def solve(self, system: NewtonSystem) -> Direction:
        return in_ball(steihaug_toint, system)


@dataclass(frozen=True)
class GeneralizedLanczos(Solver):
    """The best step within the step search's radius Δ: GLTR, which goes on along the boundary.

    Before there is a radius, as :class:`ConjugateGradient`.

    Source: Gould, Lucidi, Roma and Toint, SIAM J. Optim. 9 (1999), 504-525.
    """

    def solve(self, system: NewtonSystem) -> Direction:
        return in_ball(gltr, system)


@dataclass(frozen=True)
class Direct(Solver):
    """The system's exact solution from the matrix itself, for few parameters: n products a step.

    Within the step search's radius if there is one. Stopping rules and the preconditioner are not used.

    Args:
        indefinite: what stands for the eigenvalues where the matrix is not positive definite and there is no radius.
        limit: largest number of parameters, >= 1.

    Source: Moré and Sorensen, SIAM J. Sci. Stat. Comput. 4 (1983); without a radius Nocedal and Wright, Numerical
        Optimization (2nd ed.), section 3.4.
    """

    indefinite: IndefiniteRule = field(default_factory=AbsoluteEigenvalues)
    limit: int = 4096

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit, the largest number of parameters, is at least 1, got {self.limit}.")

    def solve(self, system: NewtonSystem) -> Direction:
        operator, rhs, damping = masked(system.operator, system.mask), -system.gradient, system.damping
        if operator.size > self.limit:
            raise ValueError(
                f"Direct() forms the curvature matrix itself, by a product for each parameter, and there are "
                f"{operator.size:,} parameters; its limit is {self.limit:,}. Use a Krylov solver, as newton_cg and "
                f"trust_region do, or pass limit={operator.size}."
            )
        if math.isinf(system.radius):
            result = dense_solve(operator, rhs, damping=damping, indefinite=self.indefinite, limit=self.limit)
        else:
            result = dense_trust_region(operator, rhs, system.radius, damping=damping, limit=self.limit)
        return descent(operator, system.gradient, result)


def in_ball(solve: Callable[..., KrylovResult], system: NewtonSystem) -> Direction:
    """The direction by a solver that takes a radius; by conjugate gradients before there is one."""
    if math.isinf(system.radius):
        return ConjugateGradient().solve(system)
    result = solve(
        system.operator,
        -system.gradient,
        system.radius,
        damping=system.damping,
        preconditioner=system.preconditioner,
        stopping=system.stopping,
    )
    return descent(system.operator, system.gradient, result)


def _led_on(system: NewtonSystem, result: KrylovResult) -> KrylovResult:
    """The very first direction in place of no solution, where that one disturbed: τp, τ = -gᵀp / (|pᵀAp| + λpᵀp).

    A gradient alone has the length of a gradient, in other units than a step.
    """
    p, image = result.disturbing_direction, result.disturbing_image
    if result.iterations > 0 or p is None or image is None:
        return result
    fall, curvature, square = dots((-system.gradient, p), (p, image), (p, p))
    size = abs(curvature) + system.damping * square
    factor = fall / size if size > 0 else math.inf
    if not 0 < factor * math.sqrt(square) <= torch.finfo(p.dtype).max:
        factor = 1.0
    return replace(result, solution=factor * p, image=factor * image)


def _followed(system: NewtonSystem, result: KrylovResult) -> KrylovResult:
    """x + τp in place of x, with τ = -(g + Ax + λx)ᵀp / |pᵀ(A + λI)p|, and ‖τp‖ at most ‖x‖."""
    p, image = result.disturbing_direction, result.disturbing_image
    assert p is not None
    assert image is not None
    assert result.disturbing_curvature is not None
    residual = -system.gradient - result.image - system.damping * result.solution
    along, square = dots((residual, p), (p, p))
    curvature = abs(result.disturbing_curvature + system.damping * square)
    # Curvature that happens to vanish must not carry the step away from all that is known.
    longest = norm_in_range(result.solution) / math.sqrt(square)
    factor = min(along / max(curvature, torch.finfo(p.dtype).tiny), longest)
    return replace(
        result,
        solution=torch.add(result.solution, p, alpha=factor),
        image=torch.add(result.image, image, alpha=factor),
    )
