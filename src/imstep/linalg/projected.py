"""A quadratic model held back, by its projections on a growing space; the steps of `gltr` and its relatives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imstep.linalg.arguments import IndefinitePreconditionerError, check_limit, check_preconditioner
from imstep.linalg.dots import dots, norm_in_range
from imstep.linalg.lanczos import smallest_eigenpair
from imstep.linalg.operator import LinearOperator
from imstep.linalg.result import KrylovResult, KrylovStatus, measured_result
from imstep.linalg.secular import solve_cubic_in_eigenbasis, solve_in_eigenbasis
from imstep.linalg.stopping import Progress, StoppingRule, first_answer
from imstep.linalg.subspace import Subspace


@dataclass(frozen=True, eq=False)
class Point:
    """The solution over a space, in the space's coordinates and outside."""

    coordinates: Tensor  # h, (k,), float64
    solution: Tensor
    image: Tensor  # A x, without damping
    residual: Tensor  # b - (A + (λ + μ)I) x
    residual_norm: float
    rounding: float  # error of the residual's own evaluation
    scale: float  # what the residual counts relative to
    multiplier: float
    decrease: float  # of what is maximised


@dataclass(frozen=True, eq=False)
class Subproblem(ABC):
    """Maximise bᵀx - xᵀ(A + λI)x/2, held back in some way that grows with ‖x‖."""

    operator: LinearOperator
    rhs: Tensor
    damping: float
    preconditioner: LinearOperator | None

    @abstractmethod
    def in_eigenbasis(self, values: Tensor, coefficients: Tensor, rounding: float) -> tuple[Tensor, float]:
        """The solution y for a diagonal A + λI, ascending, and its multiplier μ: (θᵢ + μ) yᵢ = cᵢ."""

    @abstractmethod
    def penalty(self, norm: float) -> float:
        """What the length ‖x‖ takes from the model."""

    @abstractmethod
    def bounds(self, point: Point) -> bool:
        """Whether the solution is held by a boundary."""

    def solve(self, space: Subspace) -> Point:
        """The solution over the space: no product."""
        eps = torch.finfo(self.rhs.dtype).eps
        values, rotation = torch.linalg.eigh(space.projected + self.damping * torch.eye(space.size).double())
        coefficients = rotation.mT @ (space.basis @ self.rhs).double().cpu()
        y, multiplier = self.in_eigenbasis(values, coefficients, eps)
        h = rotation @ y
        solution, image = space.combined(h)
        shift = self.damping + multiplier
        residual = self.rhs - image - shift * solution
        vectors = (residual, self.rhs, image, solution)
        squares = dots(*((vector, vector) for vector in vectors))
        residual_norm, rhs_norm, image_norm, norm = (
            norm_in_range(vector, math.sqrt(square)) for vector, square in zip(vectors, squares, strict=True)
        )
        return Point(
            coordinates=h,
            solution=solution,
            image=image,
            residual=residual,
            residual_norm=residual_norm,
            rounding=eps * (rhs_norm + image_norm + shift * norm),
            scale=max(rhs_norm, multiplier * norm),
            multiplier=multiplier,
            decrease=float(coefficients @ y - (values * y) @ y / 2) - self.penalty(float(y.norm())),
        )

    def preconditioned(self, residual: Tensor) -> tuple[Tensor, float]:
        """P r, and rᵀPr."""
        direction = residual if self.preconditioner is None else self.preconditioner.matvec(residual)
        return direction, dots((residual, direction))[0]


@dataclass(frozen=True, eq=False)
class TrustRegion(Subproblem):
    """Held back by ‖x‖ <= radius."""

    radius: float

    def in_eigenbasis(self, values: Tensor, coefficients: Tensor, rounding: float) -> tuple[Tensor, float]:
        return solve_in_eigenbasis(values, coefficients, self.radius, rounding)

    def penalty(self, norm: float) -> float:
        return 0.0

    def bounds(self, point: Point) -> bool:
        return point.multiplier > 0 or float(point.coordinates.norm()) >= self.radius


@dataclass(frozen=True, eq=False)
class Cubic(Subproblem):
    """Held back by σ‖x‖³/3."""

    sigma: float

    def in_eigenbasis(self, values: Tensor, coefficients: Tensor, rounding: float) -> tuple[Tensor, float]:
        return solve_cubic_in_eigenbasis(values, coefficients, self.sigma, rounding)

    def penalty(self, norm: float) -> float:
        return self.sigma * norm**3 / 3

    def bounds(self, point: Point) -> bool:
        return False


@dataclass(frozen=True, eq=False)
class AbsoluteValues(Subproblem):
    """bᵀx - xᵀ(|A| + λI)x/2 over the space: eigenvalues of A projected give way to their sizes, at least ``least``
    times the largest.

    |A| x outside the space is not known, so the residual is what A x has outside.
    """

    least: float

    def in_eigenbasis(self, values: Tensor, coefficients: Tensor, rounding: float) -> tuple[Tensor, float]:
        sizes = (values - self.damping).abs()
        sizes = sizes.clamp(min=self.least * float(sizes.max())) + self.damping if values.numel() else sizes
        return coefficients / sizes, 0.0

    def penalty(self, norm: float) -> float:
        return 0.0

    def bounds(self, point: Point) -> bool:
        return False

    def solve(self, space: Subspace) -> Point:
        point = super().solve(space)
        if space.size == 0:
            return point
        outside = space.basis.mT @ (space.basis @ point.image) - point.image
        decrease = float((space.basis @ self.rhs).double().cpu() @ point.coordinates) / 2
        return replace(point, residual=outside, residual_norm=norm_in_range(outside), decrease=decrease)


def solve_by_projections(
    problem: Subproblem,
    stopping: Sequence[StoppingRule],
    max_iterations: int | None,
    basis_limit: int,
    generator: torch.Generator | None,
    probes: int,
) -> KrylovResult:
    """The solution over a space that grows by residuals; where a generator is given, once more past the hard case.

    Raises:
        ValueError: basis_limit is below 6, probes below 1, or the limit on iterations negative.
    """
    check_limit(max_iterations)
    check_preconditioner(problem.operator, problem.preconditioner)
    if basis_limit < 6 or probes < 1:
        raise ValueError(f"basis_limit is at least 6 and probes at least 1, got {basis_limit} and {probes}.")
    size = problem.operator.size
    limit = 10 * size if max_iterations is None else max_iterations
    search = ProjectedSearch(problem, Subspace(problem.operator, min(basis_limit, size)))
    status = search.grow(stopping, limit)
    if status is KrylovStatus.CONVERGED and generator is not None and search.probe(generator, probes):
        status = search.grow(stopping, limit)
    return search.result(status)


class ProjectedSearch:
    """A space, the solution over it, and what brings the two forward."""

    def __init__(self, problem: Subproblem, space: Subspace) -> None:
        self._problem, self._space = problem, space
        self._point = problem.solve(space)
        self._previous = self._point.coordinates
        self._decreases = [0.0]
        self._probes = 0

    def grow(self, stopping: Sequence[StoppingRule], limit: int) -> KrylovStatus:
        """Add residuals to the space until a rule or an obstacle ends it."""
        if not math.isfinite(self._point.residual_norm):
            return KrylovStatus.NON_FINITE
        while (status := self._ending(stopping, limit)) is None:
            direction, squared_norm = self._problem.preconditioned(self._point.residual)
            if squared_norm <= 0 and self._space.products == 0:
                raise IndefinitePreconditionerError(squared_norm)
            if not 0 < squared_norm < math.inf:  # or nan
                return KrylovStatus.BREAKDOWN if squared_norm <= 0 else KrylovStatus.NON_FINITE
            if (status := self._advance(direction)) is not None:
                return status
        return status

    def probe(self, generator: torch.Generator, steps: int) -> bool:
        """Look for curvature below -μ from a random vector; whether the space has got a vector of such."""
        pair = smallest_eigenpair(self._problem.operator, generator=generator, steps=steps)
        self._probes = pair.products
        if not pair.value + self._problem.damping + self._point.multiplier < 0:  # or nan
            return False
        return self._advance(pair.vector) is None

    def result(self, status: KrylovStatus) -> KrylovResult:
        """The present point as a result."""
        point = self._point
        bound = self._problem.bounds(point)
        result = measured_result(
            self._problem.damping,
            point.solution,
            point.image,
            status=KrylovStatus.BOUNDARY if status is KrylovStatus.CONVERGED and bound else status,
            iterations=len(self._decreases) - 1,
            products=self._space.products + self._probes,
            residual_norm=point.residual_norm,
            decreases=tuple(self._decreases),
            multiplier=point.multiplier,
        )
        penalty = self._problem.penalty(float(point.coordinates.norm()))
        return replace(
            result,
            predicted_decrease=result.predicted_decrease + penalty,
            damped_decrease=result.damped_decrease + penalty,
        )

    def _ending(self, stopping: Sequence[StoppingRule], limit: int) -> KrylovStatus | None:
        point = self._point
        if point.residual_norm <= point.rounding < math.inf:
            return KrylovStatus.CONVERGED
        progress = Progress(self._space.products + self._probes, point.residual_norm, point.scale, self._decreases)
        return first_answer(stopping, progress, limit)

    def _advance(self, vector: Tensor) -> KrylovStatus | None:
        """Take a vector into the space and solve there; a status where that cannot be."""
        if self._space.full and self._space.size < self._problem.operator.size:
            self._reduce()
        unit = self._space.direction(vector)
        if unit is None:  # a residual, orthogonal to the space, that lies in it is rounding
            return KrylovStatus.CONVERGED
        if not self._space.add(unit):
            return KrylovStatus.NON_FINITE
        self._previous, self._point = self._point.coordinates, self._problem.solve(self._space)
        self._decreases.append(self._point.decrease)
        return None

    def _reduce(self) -> None:
        """Keep what the next iterate is built from: the last two, and Ritz vectors of negative curvature."""
        pad = lambda h: torch.nn.functional.pad(h, (0, self._space.size - len(h)))
        last, previous = pad(self._point.coordinates), pad(self._previous)
        values, vectors = torch.linalg.eigh(self._space.projected)
        # Any other vector would spoil what two iterates keep of all directions before, as in conjugate gradients.
        ritz = vectors[:, :2][:, values[:2] + self._problem.damping < 0]
        kept = self._space.restart(torch.cat([last[:, None], previous[:, None], ritz], dim=1))
        self._point, self._previous = replace(self._point, coordinates=kept.mT @ last), kept.mT @ previous
