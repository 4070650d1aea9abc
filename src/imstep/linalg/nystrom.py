"""Randomised low-rank approximation of a positive semidefinite matrix, and the preconditioner it makes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg.arguments import check_not_negative
from imstep.linalg.dots import norm_in_range
from imstep.linalg.operator import LinearOperator
from imstep.linalg.precision import full_precision


@dataclass(frozen=True, eq=False)
class NystromApproximation:
    """A ≈ U diag(Λ) Uᵀ with orthonormal U.

    Attributes:
        vectors: U, (n, r).
        values: Λ >= 0, (r,), in descending order, in the dtype of the vectors.
        products: products with A that were spent; 0 where it was put together from saved tensors.
    """

    vectors: Tensor
    values: Tensor
    products: int = 0

    @property
    def rank(self) -> int:
        """The number r of vectors."""
        return self.values.numel()

    def preconditioner(self, damping: float) -> NystromPreconditioner:
        """P ≈ (A + λI)⁻¹ for a damping λ >= 0; no product."""
        return NystromPreconditioner(self, damping)


class NystromPreconditioner(LinearOperator):
    """P = U (Λ + λI)⁻¹ Uᵀ + (I - U Uᵀ) / (Λᵣ + λ), applied to residuals.

    The directions that U leaves out count as if they had the least eigenvalue found. Up to the factor Λᵣ + λ, which no
    Krylov method feels, this is the preconditioner of the source.

    Raises:
        ValueError: λ is negative or not finite.

    Cost: 8 n r operations to apply.

    Source: Frangella, Tropp & Udell, SIAM J. Matrix Anal. Appl. 44 (2023), 718-752 (arXiv 2110.02820), eq. (1.3) and
    (5.3).

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> A = DiagonalOperator(torch.tensor([9.0, 4.0, 1.0, 1.0]))
        >>> U = torch.eye(4)[:, :3]
        >>> P = NystromApproximation(U, torch.tensor([9.0, 4.0, 1.0])).preconditioner(damping=1.0)
        >>> P @ (A @ torch.ones(4) + torch.ones(4))
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, approximation: NystromApproximation, damping: float) -> None:
        check_not_negative(damping=damping)
        vectors, values = approximation.vectors, approximation.values
        super().__init__(vectors.shape[0], vectors.dtype, vectors.device)
        self._vectors = vectors
        largest, least = (float(values[0]), float(values[-1])) if approximation.rank else (0.0, 0.0)
        # A matrix whose rank is found and no damping leave nothing to divide the rest by.
        self._rest = max(least + damping, torch.finfo(vectors.dtype).eps * largest) or 1.0
        self._values = (values + damping).clamp(min=self._rest)[:, None]

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, block: Tensor) -> Tensor:
        inside = self._vectors.mT @ block
        outside = block - self._vectors @ inside
        # Divided by a small number, what rounding has left of the leading directions would outweigh them: once more.
        outside -= self._vectors @ (self._vectors.mT @ outside)
        return self._vectors @ (inside / self._values) + outside / self._rest


@full_precision
def nystrom(operator: LinearOperator, rank: int, *, generator: torch.Generator) -> NystromApproximation:
    """Approximate a positive semidefinite A by products with random vectors.

        Y = A Ω,   A ≈ Y (Ωᵀ Y)⁺ Yᵀ,   Ω (n, r) random and orthonormal

    the best positive semidefinite approximation whose range is that of Y. A matrix with negative eigenvalues is shifted
    by what Ωᵀ A Ω shows of them, so that the approximation is one of the part above.

    Args:
        operator: A, self-adjoint, positive semidefinite up to rounding, size n.
        rank: r >= 1; at most n are taken.
        generator: draws Ω, on its own device.

    Returns:
        A `NystromApproximation`. If a product is not finite, so are its values not.

    Raises:
        ValueError: rank < 1.

    Cost: r products, as one block; 2 vectors of size n for each; 6 n r² operations.

    Source: Frangella, Tropp & Udell, SIAM J. Matrix Anal. Appl. 44 (2023), 718-752, Algorithm 2.1; the larger shift for
    indefinite matrices is our choice.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> A = DiagonalOperator(torch.tensor([5.0, 2.0, 0.0, 0.0]))
        >>> approximation = nystrom(A, rank=3, generator=torch.Generator().manual_seed(0))
        >>> [round(value, 4) for value in approximation.values.tolist()], approximation.products
        ([5.0, 2.0, 0.0], 3)
    """
    if rank < 1:
        raise ValueError(f"rank is at least 1, got {rank}.")
    test = _random_block(operator, min(rank, operator.size), generator, None)
    return _decomposed(test, operator.matmat(test))


@full_precision
def adaptive_nystrom(
    operator: LinearOperator,
    damping: float,
    *,
    generator: torch.Generator,
    rank: int = 8,
    largest: int = 128,
    ratio: float = 10.0,
) -> NystromApproximation:
    """As :func:`nystrom`, the rank doubled until the least eigenvalue found is Λᵣ <= ratio · λ.

    Beyond that more vectors bring little, as the condition number of the preconditioned A + λI is bounded by about
    (Λᵣ + λ + error) / λ.

    Args:
        operator: A, self-adjoint, positive semidefinite up to rounding, size n.
        damping: λ >= 0 of the systems to be solved; for 0 the rank grows to `largest`.
        generator: draws the random vectors, on its own device.
        rank: to begin with, >= 1.
        largest: rank at most, >= rank.
        ratio: > 0.

    Returns:
        A `NystromApproximation`; no product is made twice.

    Raises:
        ValueError: a number out of range.

    Cost: one product for each vector, in log₂(r / rank) + 1 blocks.

    Source: Frangella, Tropp & Udell, SIAM J. Matrix Anal. Appl. 44 (2023), 718-752, section 5.4; the defaults of `rank`
    and `largest` are our choice.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> A = DiagonalOperator(torch.logspace(0, -9, 200, dtype=torch.float64))
        >>> adaptive_nystrom(A, damping=1e-2, generator=torch.Generator().manual_seed(0)).rank
        32
    """
    check_not_negative(damping=damping)
    if not (1 <= rank <= largest and ratio > 0):
        raise ValueError(
            f"rank is at least 1 and at most largest, and ratio is positive; got rank={rank}, largest={largest}, "
            f"ratio={ratio}."
        )
    largest = min(largest, operator.size)
    test = _random_block(operator, min(rank, largest), generator, None)
    images = operator.matmat(test)
    while (approximation := _decomposed(test, images)).rank < largest:
        if not float(approximation.values[-1]) > ratio * damping:  # or nan
            break
        more = _random_block(operator, min(test.shape[1], largest - test.shape[1]), generator, test)
        test, images = torch.cat([test, more], dim=1), torch.cat([images, operator.matmat(more)], dim=1)
    return approximation


def _random_block(
    operator: LinearOperator, columns: int, generator: torch.Generator, others: Tensor | None
) -> Tensor:
    """Orthonormal random columns (n, k), orthogonal to others."""
    block = torch.randn(operator.size, columns, generator=generator, device=generator.device, dtype=operator.dtype)
    block = block.to(operator.device)
    if others is not None:
        for _ in range(2):
            block -= others @ (others.mT @ block)
    return torch.linalg.qr(block)[0]


def _decomposed(test: Tensor, images: Tensor) -> NystromApproximation:
    """The approximation from orthonormal Ω and Y = A Ω."""
    size, rank = test.shape
    if not bool(torch.isfinite(images).all()):
        return NystromApproximation(test, torch.full_like(test[0], math.nan), rank)
    # In units of A, by a power of four, whose root is exact: squares may leave the range of the dtype.
    most = math.frexp(torch.finfo(test.dtype).max)[1] // 2 - 1
    unit = 4.0 ** min(max(math.frexp(norm_in_range(images))[1] // 2, -most), most)
    images = images / unit
    core = (test.mT @ images).double()
    core = (core + core.mT) / 2
    least = float(torch.linalg.eigvalsh(core)[0])
    shift = math.sqrt(size) * torch.finfo(test.dtype).eps * float(images.norm()) + max(0.0, -2 * least)
    if shift == 0:
        return NystromApproximation(test, torch.zeros_like(test[0]), rank)
    core.diagonal().add_(shift)
    factor = torch.linalg.cholesky(core).to(test.dtype)
    root = torch.linalg.solve_triangular(factor, (images + shift * test).mT, upper=False).mT
    # The singular values of the tall matrix from its small factor, in float64: their squares keep all digits.
    basis, small = torch.linalg.qr(root)
    rotation, values, _ = torch.linalg.svd(small.double())
    values = unit * (values**2 - shift).clamp(min=0)
    return NystromApproximation(basis @ rotation.to(basis), values.to(basis), rank)
