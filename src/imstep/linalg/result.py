"""What a Krylov solver returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from imstep.linalg.dots import dots


class KrylovStatus(Enum):
    """Why a Krylov solver ended; a member's value is its message, its lower-case name the word for files.

    Example:
        >>> str(KrylovStatus.DISTURBING_NEGATIVE_CURVATURE)
        'disturbing_negative_curvature'
        >>> KrylovStatus.BOUNDARY.message
        'the iterate reached the boundary of the trust region'
    """

    CONVERGED = "the residual meets the tolerance, or is at rounding level"
    DISTURBING_NEGATIVE_CURVATURE = "a search direction with negative or vanishing curvature was found"
    DISTURBING_NOISE = "a search direction whose curvature cannot be told from mini-batch noise was found"
    ENOUGH = "further products would bring too little progress"
    BREAKDOWN = "rounding, or a preconditioner that is not positive definite, leaves no direction to go on with"
    BOUNDARY = "the iterate reached the boundary of the trust region"
    LEAST_SQUARES = "the system has no solution; the residual is as small as it can be"
    MAX_ITERATIONS = "the limit on iterations or products was reached"
    NON_FINITE = "a product or an iterate was not finite; the last finite iterate is returned"

    @property
    def message(self) -> str:
        """A clause that explains the status to a reader."""
        return self.value

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def disturbing(self) -> bool:
        """Whether a disturbing direction ended the solve."""
        return self in (KrylovStatus.DISTURBING_NEGATIVE_CURVATURE, KrylovStatus.DISTURBING_NOISE)


@dataclass(frozen=True, eq=False)
class KrylovResult:
    """An approximate solution x of (A + λI) x = b, and what the solver learnt on the way.

    Attributes:
        solution: x, (n,).
        image: A x, (n,), without the damping λ; from the recurrence, no extra product.
        status: why the solver ended.
        iterations: directions along which x moved.
        products: products with A that were spent (also on a disturbing direction, a warm start, a refresh).
        residual_norm: ‖b - (A + λI) x‖, from the recurrence; with a multiplier μ of A + (λ + μ)I instead.
        predicted_decrease: bᵀx - xᵀAx/2, the decrease of the model *without* damping.
        damped_decrease: bᵀx - xᵀ(A + λI)x/2, what the solver maximises.
        curvature: xᵀAx, without damping.
        decreases: the damped decrease at x₀, x₁, ..., one per iterate.
        disturbing_direction: the search direction p, (n,), that ended a disturbed solve, of any length, else
            None.
        disturbing_image: A p, without damping, for that direction, else None.
        disturbing_curvature: pᵀAp, without damping, for that direction, else None.
        multiplier: μ >= 0 with (A + (λ + μ)I) x ≈ b, of a trust region or a shift; None where it is not known.
        pairs: the last directions p with their images A p, (n,) each, as many as the solver was asked to keep.
        iterates: earlier solutions x with their images A x, (n,) each, as the solver was asked to keep; oldest first.
    """

    solution: Tensor
    image: Tensor
    status: KrylovStatus
    iterations: int
    products: int
    residual_norm: float
    predicted_decrease: float
    damped_decrease: float
    curvature: float
    decreases: tuple[float, ...]
    disturbing_direction: Tensor | None = None
    disturbing_image: Tensor | None = None
    disturbing_curvature: float | None = None
    multiplier: float | None = None
    pairs: tuple[tuple[Tensor, Tensor], ...] = ()
    iterates: tuple[tuple[Tensor, Tensor], ...] = ()


def measured_result(
    damping: float,
    solution: Tensor,
    image: Tensor,
    *,
    status: KrylovStatus,
    iterations: int,
    products: int,
    residual_norm: float,
    decreases: tuple[float, ...],
    disturbing_direction: Tensor | None = None,
    disturbing_image: Tensor | None = None,
    disturbing_curvature: float | None = None,
    multiplier: float | None = None,
) -> KrylovResult:
    """The result at a solution x, completed by what x and its image A x tell."""
    curvature, squared_norm = dots((solution, image), (solution, solution))
    return KrylovResult(
        solution=solution,
        image=image,
        status=status,
        iterations=iterations,
        products=products,
        residual_norm=residual_norm,
        predicted_decrease=decreases[-1] + damping * squared_norm / 2,
        damped_decrease=decreases[-1],
        curvature=curvature,
        decreases=decreases,
        disturbing_direction=disturbing_direction,
        disturbing_image=disturbing_image,
        disturbing_curvature=disturbing_curvature,
        multiplier=multiplier,
    )
