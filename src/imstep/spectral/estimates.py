"""Trace and diagonal from products with random vectors, with the error of the result."""

from __future__ import annotations

from functools import partial

import torch

from imstep.linalg import LinearOperator
from imstep.spectral.adaptive import Adaptive, Diagonal, Trace
from imstep.spectral.groups import per_group
from imstep.spectral.parts import traces_by_parts
from imstep.spectral.probes import generator_of
from imstep.spectral.results import DiagonalEstimate, Estimate
from imstep.uncompiled import uncompiled


@uncompiled
@partial(per_group, at_once=traces_by_parts)
def trace(
    operator: LinearOperator,
    rtol: float = 1e-2,
    *,
    atol: float = 0.0,
    seed: int = 0,
    generator: torch.Generator | None = None,
    max_products: int = 10_000,
    by: str | None = None,
) -> Estimate:
    """The trace of A by random probes, after the directions in which A is large have been taken out.

        tr A = tr(Q A Qᵀ) + E[vᵀ P A P v],   P = I - Qᵀ Q,   v random signs

    The rows of Q span products with earlier probes. More are taken while they save more products than they cost; where
    all n products cost no more, the trace is exact.

    The Hessian or Gauss-Newton matrix of a closure is sampled at the outputs of layers y = W x instead, with noise of
    its own for each example, so that one pass gives an estimate for every one:

        tr H_WW = Σ_examples E[nᵀ S n],   S the second derivative of the loss in y,   cov(n_i, n_j) = (x_i · x_j) I

    That examples do not influence each other is checked; parameters that are used in another way are left to products.

    Args:
        operator: A, square; need not be symmetric.
        rtol: error relative to the trace at which to end, >= 0.
        atol: error at which to end in any case, >= 0; for a trace near zero.
        seed: of the random signs; or pass a ``generator``.
        max_products: ends there, unconverged.
        by: "layer" or "parameter" for the traces of the diagonal blocks of an operator over a model, a dictionary.

    Returns:
        An :class:`Estimate`. Its value is nan if a product was not finite. Its products count a pass as one.

    Raises:
        ValueError: an argument out of range; A is rectangular; ``by`` of an operator that belongs to no model.

    Cost: at outputs of layers about ten passes to begin with, then the fewer the more examples there are. Else, without
    a decay of eigenvalues, about 8 (‖A‖_F / (rtol tr A))² products; a few dozen where few eigenvalues make up the
    trace. Memory for Q, at most 1 GiB, and some blocks of 8 vectors.

    Source: Meyer, Musco, Musco and Woodruff, SOSA 2021 (arXiv 2010.09649), Hutch++; adaptively, Persson, Cortinovis and
    Kressner, SIAM J. Matrix Anal. Appl. 43 (2022) (arXiv 2109.10659). The rule by which Q grows and the noise at
    outputs are our own.

    Example:
        >>> from imstep.linalg import DiagonalOperator
        >>> trace(DiagonalOperator(torch.tensor([1.0, 2.0, 4.0]))).value
        7.0
    """
    mean = Adaptive(operator, Trace(), generator_of(seed, generator)).to(rtol, atol, max_products)
    return Estimate(float(mean.value), float(mean.error), mean.products, mean.converged)


@uncompiled
@per_group
def diagonal(
    operator: LinearOperator,
    rtol: float = 1e-1,
    *,
    atol: float = 0.0,
    seed: int = 0,
    generator: torch.Generator | None = None,
    max_products: int = 10_000,
    by: str | None = None,
) -> DiagonalEstimate:
    """The diagonal of A by random probes, after the directions in which A is large have been taken out.

        diag A = diag(Qᵀ Q A) + E[v * (P A v)],   P = I - Qᵀ Q,   v random signs

    Exact for a diagonal matrix.

    Args:
        operator: A, square; need not be symmetric.
        rtol: norm of the errors relative to that of the diagonal at which to end, >= 0.
        atol: norm of the errors at which to end in any case, >= 0.
        seed, generator, max_products, by: as for :func:`trace`.

    Returns:
        A :class:`DiagonalEstimate`.

    Raises:
        ValueError: as for :func:`trace`.

    Cost: without a decay of eigenvalues about 4 (‖A‖_F / (rtol ‖diag A‖))² products, and never much more than n; memory
    as for :func:`trace`.

    Source: Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57 (2007), 1214-1229; with Q, Baston and Nakatsukasa
    (arXiv 2208.03268), Diag++.

    Example:
        >>> from imstep.linalg import DenseOperator
        >>> diagonal(DenseOperator(torch.tensor([[2.0, 1.0], [1.0, -3.0]]))).value
        tensor([ 2., -3.])
    """
    mean = Adaptive(operator, Diagonal(), generator_of(seed, generator)).to(rtol, atol, max_products)
    return DiagonalEstimate(mean.value, mean.error, mean.products, mean.converged)
