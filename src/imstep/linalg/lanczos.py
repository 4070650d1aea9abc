"""The Lanczos process, and the extreme eigenpairs that it finds first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.dots import norm_in_range
from imstep.linalg.fitting import check_vectors
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """A Q = Q T + β_k q eₖᵀ with orthonormal Q and tridiagonal T, k steps.

    Attributes:
        alphas: the diagonal of T, (k,), float64 on the CPU.
        betas: β_1, ..., β_k, (k,), float64 on the CPU: the off-diagonal of T, and last the norm of what T
            leaves out.
        basis: Q, (n, k).
    """

    alphas: Tensor
    betas: Tensor
    basis: Tensor

    @property
    def steps(self) -> int:
        """The number k of steps, which is the number of products."""
        return self.alphas.numel()

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k,) of T in ascending order and its eigenvectors (k, k), float64 on the CPU."""
        off_diagonal = self.betas[:-1]
        tridiagonal = torch.diag(self.alphas) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        return values, vectors


@dataclass(frozen=True, eq=False)
class Eigenpair:
    """An approximate eigenpair (θ, y) of A, ‖y‖ = 1.

    Attributes:
        value: θ = yᵀAy; nan if no product was finite.
        vector: y, (n,).
        residual_norm: ‖A y - θ y‖: some eigenvalue of A lies within this distance of θ.
        products: products with A that were spent.
        magnitude: the largest |θ| that was met; nan if no product was finite.
    """

    value: float
    vector: Tensor
    residual_norm: float
    products: int
    magnitude: float


@full_precision
def lanczos(operator: LinearOperator, start: Tensor, steps: int) -> LanczosResult:
    """An orthonormal basis of span{q, A q, A² q, ...} in which A is tridiagonal.

    Every new vector is orthogonalised twice against all earlier ones, so the basis stays orthonormal to
    rounding and no eigenvalue appears twice. Ends early at an invariant space, or a non-finite product.

    Args:
        operator: A, self-adjoint, size n.
        start: (n,), not zero; need not have norm 1.
        steps: >= 1; at most n are done.

    Returns:
        A `LanczosResult` of k <= steps steps; k = 0 only if the first product was not finite.

    Raises:
        TypeError, ValueError: `start` does not fit the operator, is zero or not finite; steps < 1.

    Cost: k products, k vectors of size n kept, 4 n k² operations.

    Source: Golub & Van Loan, Matrix Computations (4th ed.), section 10.1 and 10.3 (complete
    reorthogonalisation); "twice is enough": Parlett, The Symmetric Eigenvalue Problem, section 6.9.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> result = lanczos(DiagonalOperator(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3), steps=3)
        >>> [round(value, 4) for value in result.ritz()[0].tolist()]
        [1.0, 2.0, 4.0]
    """
    check_vectors(operator, start)
    norm = norm_in_range(start)
    if start.ndim != 1 or not 0 < norm < math.inf:
        raise ValueError(
            f"lanczos needs one finite start vector that is not zero, got shape {tuple(start.shape)} and "
            f"norm {norm}. Pass for example a random vector."
        )
    if steps < 1:
        raise ValueError(f"lanczos needs at least one step, got {steps}.")
    steps = min(steps, operator.size)
    basis = start.new_empty(steps, operator.size)  # one vector a row, contiguous
    alphas: list[float] = []
    betas: list[float] = []
    vector = start.detach() / norm
    scale = 0.0
    for step in range(steps):
        basis[step] = vector
        image = operator.matvec(vector)
        along = torch.dot(vector, image)
        known = basis[: step + 1]
        for _ in range(2):
            image = image - known.mT @ (known @ image)
        alpha, beta = torch.stack([along, image.norm()]).tolist()
        beta = norm_in_range(image, beta)
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            break
        alphas.append(alpha)
        betas.append(beta)
        scale = max(scale, abs(alpha) + beta)
        # What is left of the product is rounding: the space is invariant and T is complete.
        if beta <= 10 * torch.finfo(start.dtype).eps * scale:
            break
        vector = image / beta
    done = len(alphas)
    return LanczosResult(
        torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64), basis[:done].mT
    )


@full_precision
def smallest_eigenpair(
    operator: LinearOperator, *, generator: torch.Generator | None = None, steps: int = 32
) -> Eigenpair:
    """The smallest eigenvalue of A and its vector, as well as so many products tell, for the way out of a saddle.

    For pairs to a given accuracy, and for more than one, there is :func:`imstep.spectral.eigenpairs`.

    Args:
        operator: A, self-adjoint, size n >= 1.
        generator: draws the normal start vector, on its own device; without it one of seed 0 does.
        steps: products to spend, at most; >= 1.

    Returns:
        An `Eigenpair`; its value is never below the smallest eigenvalue, except by rounding.

    Raises:
        ValueError: steps < 1.

    Cost: `steps` products, as many vectors of size n.

    Source: Kuczynski & Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992): from a random start the relative
    error of k steps is of order (ln n / k)².

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> A = DiagonalOperator(torch.tensor([-3.0, 1.0, 2.0]))
        >>> round(smallest_eigenpair(A).value, 4)
        -3.0
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    start = torch.randn(operator.size, generator=generator, device=generator.device, dtype=operator.dtype)
    start = operator.held(start.to(operator.device))
    process = lanczos(operator, start, steps)
    if process.steps == 0:
        return Eigenpair(math.nan, start / start.norm(), math.inf, products=1, magnitude=math.nan)
    values, vectors = process.ritz()
    weights = vectors[:, 0]
    vector = process.basis @ weights.to(start)
    residual_norm = process.betas[-1].item() * abs(weights[-1].item())
    magnitude = values.abs().max().item()
    return Eigenpair(values[0].item(), vector / vector.norm(), residual_norm, process.steps, magnitude)


@full_precision
def largest_eigenpair(
    operator: LinearOperator, *, generator: torch.Generator | None = None, steps: int = 32
) -> Eigenpair:
    """The largest eigenvalue of A and its vector; otherwise as `smallest_eigenpair`, of -A.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> A = DiagonalOperator(torch.tensor([-3.0, 1.0, 2.0]))
        >>> round(largest_eigenpair(A).value, 4)
        2.0
    """
    pair = smallest_eigenpair(-operator, generator=generator, steps=steps)
    return Eigenpair(-pair.value, pair.vector, pair.residual_norm, pair.products, pair.magnitude)
