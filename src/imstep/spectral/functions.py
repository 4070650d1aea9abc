"""Single numbers that sum a spectrum up: norm, determinant, condition."""

from __future__ import annotations

import math

import torch

from imstep.linalg import LinearOperator
from imstep.linalg.arguments import check_not_negative
from imstep.spectral.eigenpairs import eigenpairs
from imstep.spectral.estimates import Estimate, trace
from imstep.spectral.groups import per_group
from imstep.spectral.probes import generator_of, images, norms, signs
from imstep.spectral.quadrature import quadrature
from imstep.uncompiled import uncompiled


@uncompiled
@per_group
def frobenius_norm(
    operator: LinearOperator,
    rtol: float = 1e-2,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    max_products: int = 10_000,
    by: str | None = None,
) -> Estimate:
    """‖A‖_F, the root of the sum of all squared entries, from the trace of AᵀA.

    Args:
        operator: A, of any shape.
        rtol: error relative to the norm at which to end, >= 0.
        seed, generator, max_products, by: as for :func:`~imstep.spectral.trace`.

    Returns:
        An :class:`~imstep.spectral.Estimate`.

    Raises:
        ValueError: as for :func:`~imstep.spectral.trace`.

    Cost: that of the trace of AᵀA, each product of which is two.

    Example:
        >>> from imstep.linalg import DenseOperator
        >>> round(frobenius_norm(DenseOperator(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))).value, 4)
        5.0
    """
    generator = generator_of(seed, generator)
    tall = operator.T if operator.shape[0] < operator.shape[1] else operator
    found = _root_of_gram(tall, rtol, generator, max_products)
    limits, n = torch.finfo(operator.dtype), min(operator.shape)
    if n == 0 or n * limits.tiny / limits.eps < found.value**2 < limits.eps * limits.max:
        return found
    # Entries of AᵀA leave the range of the dtype where those of A do not: a power of two brings them back, exactly.
    probe = signs(tall.T @ tall, 1, generator)
    size = float(norms(images(tall, probe))[0])
    if not 0 < size < math.inf:
        return found
    most = math.frexp(limits.max)[1] - 2
    unit = 2.0 ** min(max(math.frexp(size)[1], -most), most)
    again = _root_of_gram((1 / unit) * tall, rtol, generator, max_products)
    return Estimate(unit * again.value, unit * again.error, found.products + 1 + again.products, again.converged)


def _root_of_gram(operator: LinearOperator, rtol: float, generator: torch.Generator, max_products: int) -> Estimate:
    """‖A‖_F as the root of the trace of AᵀA."""
    gram = operator.T @ operator
    squared = trace(gram, 2 * rtol, generator=generator, max_products=max(1, max_products // 2))
    norm = math.sqrt(max(squared.value, 0.0)) if math.isfinite(squared.value) else math.nan
    # Of an interval about the square; where that reaches zero, so does the norm's.
    error = norm - math.sqrt(max(squared.value - squared.error, 0.0)) if math.isfinite(norm) else math.nan
    return Estimate(norm, error, 2 * squared.products, squared.converged)


@uncompiled
@per_group
def log_determinant(
    operator: LinearOperator,
    damping: float = 0.0,
    *,
    steps: int = 100,
    probes: int = 10,
    rtol: float = 1e-2,
    seed: int = 0,
    generator: torch.Generator | None = None,
    by: str | None = None,
) -> Estimate:
    """log det(A + λI) of a positive definite A + λI, by stochastic Lanczos quadrature.

        log det(A + λI) = tr log(A + λI)  ≈  n · mean over probes of Σ ω log(θ + λ)

    Args:
        operator: A, self-adjoint, of size n.
        damping: λ >= 0.
        steps: of each probe; about the root of the condition number of A + λI.
        probes: random vectors of signs; at least 2 for an error.
        rtol: relative error below which the result counts as converged.
        seed: of the probes; or pass a ``generator``.
        by: "layer" or "parameter" for those of the diagonal blocks of an operator over a model, a dictionary.

    Returns:
        An :class:`~imstep.spectral.Estimate`. Its error includes how far half of the steps would have been off.

    Raises:
        ValueError: an eigenvalue of A + λI that is not positive was found; an argument out of range.

    Cost: as :func:`~imstep.spectral.density`.

    Source: Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017), 1075-1099, section 4.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> round(log_determinant(DiagonalOperator(torch.tensor([1.0, 2.0])), damping=1.0).value, 4)
        1.7918
    """
    check_not_negative(damping=damping, rtol=rtol)
    spectrum = quadrature(operator, steps, probes, generator_of(seed, generator))
    if not spectrum.finite:
        return Estimate(math.nan, math.inf, spectrum.products, False)
    nodes = torch.cat([nodes for nodes, _ in spectrum.rules()])
    least, size = float(nodes.min()) + damping, float(nodes.abs().max()) + damping
    if not least > torch.finfo(operator.dtype).eps * size:
        raise ValueError(
            f"log_determinant needs a positive definite matrix, and A + damping I has an eigenvalue of at most "
            f"{least:.3g}, where its largest are {size:.3g}. Raise damping above {damping:g}, or take a Gauss-Newton "
            "or Fisher matrix with damping."
        )
    logarithm = lambda at: (at + damping).clamp(min=least).log()
    value, error = spectrum.mean(logarithm)
    halfway, _ = spectrum.mean(logarithm, part=0.5)
    total = operator.size * float(value)
    doubt = operator.size * (float(error) + abs(float(value - halfway)))
    return Estimate(total, doubt, spectrum.products, doubt <= rtol * abs(total))


@uncompiled
@per_group
def condition_number(
    operator: LinearOperator,
    damping: float = 0.0,
    *,
    tol: float = 1e-6,
    seed: int = 0,
    generator: torch.Generator | None = None,
    max_products: int | None = None,
    by: str | None = None,
) -> Estimate:
    """The largest eigenvalue of A + λI by the smallest, of a positive semidefinite A.

    Args:
        operator: A, self-adjoint, of size n.
        damping: λ >= 0.
        tol: as for :func:`~imstep.spectral.eigenpairs`, for each of the two; where the smallest cannot be told from
            zero by it, that is looked for once more, as far as rounding lets.
        seed, generator, max_products: as for :func:`~imstep.spectral.eigenpairs`.
        by: "layer" or "parameter" for those of the diagonal blocks of an operator over a model, a dictionary.

    Returns:
        An :class:`~imstep.spectral.Estimate`, with the error that the residuals of the eigenpairs allow. Infinite where
        the smallest eigenvalue cannot be told from zero: raise the damping, or work in float64.

    Raises:
        ValueError: A + λI has a negative eigenvalue; A is not symmetric.

    Cost: that of two eigenpairs. The smallest takes about the root of the condition number of products.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> condition_number(DiagonalOperator(torch.tensor([1.0, 2.0, 7.0])), damping=1.0).value
        4.0
    """
    check_not_negative(damping=damping)
    generator = generator_of(seed, generator)
    end = lambda which, tol=tol: eigenpairs(operator, 1, which, tol, generator=generator, max_products=max_products)
    ends = [end("LA"), end("SA")]
    products = sum(end.products for end in ends)
    rounding = torch.finfo(operator.dtype).eps * (abs(float(ends[0].values[0])) + damping)
    away = lambda end: float(end.residual_norms[0]) + rounding
    if abs(float(ends[1].values[0]) + damping) <= away(ends[1]):
        ends[1] = end("SA", 0.0)
        products += ends[1].products
    largest, smallest = (float(end.values[0]) + damping for end in ends)
    if not math.isfinite(largest + smallest):
        return Estimate(math.nan, math.inf, products, False)
    off = [away(end) for end in ends]
    if smallest < -off[1]:
        raise ValueError(
            f"condition_number is for positive semidefinite matrices, and A + damping I has the eigenvalue "
            f"{smallest:.3g}. Raise damping by more than that, or take a Gauss-Newton or Fisher matrix."
        )
    if smallest <= off[1]:
        return Estimate(math.inf, math.inf, products, False)
    value = largest / smallest
    error = (largest + off[0]) / (smallest - off[1]) - value
    return Estimate(value, error, products, all(end.converged for end in ends))
