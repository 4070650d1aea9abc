"""Stochastic Lanczos quadrature: the spectrum as a few nodes and weights for each random vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imstep.linalg import LinearOperator
from imstep.linalg.dots import row_dots
from imstep.linalg.symmetry import asymmetric, symmetric_part, tolerance
from imstep.spectral.probes import Samples, images, norms, signs

F64 = torch.float64
_ROOM = 2**31
"""Bytes that the vectors of the probes that run together may fill."""

_LARGEST = 2048
"""Rows of a matrix whose eigenvalues are computed, rather than estimated, where that takes no more products."""


Rule = tuple[Tensor, Tensor]
"""Nodes and weights, (k,) each."""


def gauss(process: Tensor) -> Rule:
    """The quadrature of a process T (k, k + 1): k nodes, between the extreme eigenvalues, exact to degree 2 k - 1."""
    return _rule(process[:, :-1])


def averaged(process: Tensor) -> Rule:
    """That of 2 k - 1 nodes, whose T goes on as if it ran backwards from its end: exact to degree 2 k at least, and
    some ten times nearer in trials on densities, with nodes that may lie beyond the extreme eigenvalues.

    Source: Spalević, Math. Comp. 76 (2007), 1483-1492; Reichel, Spalević and Tang, BIT 56 (2016), 1045-1067.
    """
    k = len(process)
    longer = process.new_zeros(2 * k - 1, 2 * k - 1)
    longer[:k, : k + 1] = process[:, : 2 * k - 1]
    longer[k:, k:] = process[: k - 1, : k - 1].flip(0, 1)
    return _rule(longer)


def _rule(matrix: Tensor) -> Rule:
    """The rule of a symmetric matrix, of which the upper half is read."""
    nodes, vectors = torch.linalg.eigh(matrix, UPLO="U")
    return nodes, vectors[0] ** 2


@dataclass(frozen=True, eq=False)
class Quadrature:
    """For each probe v, ‖v‖ = 1, the matrix T of its Lanczos process: vᵀf(A)v ≈ e₁ᵀf(T)e₁.

    Attributes:
        processes: T, (k, k + 1) with k <= steps, float64 on the CPU; the last column has what would lead on.
        values: all n eigenvalues where they were computed instead.
        products: products with A that were spent.
        finite: whether all products were finite.
    """

    processes: list[Tensor]
    values: Tensor | None
    products: int
    finite: bool = True

    def rules(self, part: float = 1.0, by: Callable[[Tensor], Rule] = gauss) -> list[Rule]:
        """Nodes and weights for each probe, after a part of the steps; all eigenvalues are a single rule."""
        if self.values is not None:
            return [(self.values, torch.full_like(self.values, 1 / len(self.values)))]
        parts = ((T, max(1, round(part * len(T)))) for T in self.processes)
        return [by(T[:k, : k + 1]) for T, k in parts]

    def mean(
        self, function: Callable[[Tensor], Tensor], part: float = 1.0, by: Callable[[Tensor], Rule] = gauss
    ) -> tuple[Tensor, Tensor]:
        """The mean of f over the eigenvalues and half the width of its interval of 95 %.

        Args:
            function: nodes (k,) -> values (..., k).
        """
        samples = Samples()
        samples.add(torch.stack([function(nodes) @ weights for nodes, weights in self.rules(part, by)]))
        return samples.mean, torch.zeros_like(samples.mean) if self.values is not None else samples.half_width


def quadrature(
    operator: LinearOperator,
    steps: int,
    probes: int,
    generator: torch.Generator,
    settled: Callable[[list[Tensor]], bool] | None = None,
) -> Quadrature:
    """The processes of random signs, all probes together, a block of products a step.

    They end before ``steps`` where ``settled`` says so of the matrices T that run together, so far.

    The vectors are not kept: what they lose of their orthogonality leaves the quadrature as good as it is, since copies
    of a node share its weight.

    Source: Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017), 1075-1099; without orthogonalisation,
    Knizhnerman, Comput. Math. Math. Phys. 36 (1996), and Chen, Trogdon and Ubaru, ICML 2021 (arXiv 2105.06595).
    """
    size = operator.size
    if steps < 1 or probes < 1:
        raise ValueError(f"steps and probes are at least 1, got {steps} and {probes}.")
    if size == 0:
        raise ValueError("an operator of size 0 has no spectrum.")
    if size <= min(steps * probes, _LARGEST):
        return _all_eigenvalues(operator)
    together = max(1, _ROOM // (4 * size * operator.dtype.itemsize))
    processes: list[Tensor] = []
    products, finite = 0, True
    for start in range(0, probes, together):
        vectors = signs(operator, min(together, probes - start), generator).div_(size**0.5)
        made, spent = _lanczos(operator, vectors, min(steps, size), settled)
        processes, products = processes + made, products + spent
        finite = finite and all(bool(torch.isfinite(T).all()) for T in made)
    return Quadrature(processes, None, products, finite)


def _lanczos(
    operator: LinearOperator, vectors: Tensor, steps: int, settled: Callable[[list[Tensor]], bool] | None
) -> tuple[list[Tensor], int]:
    """T of each unit vector, (k, n), and the number of products."""
    count, eps = len(vectors), torch.finfo(vectors.dtype).eps
    made = torch.zeros(count, steps + 1, steps + 1, dtype=F64)
    lengths = torch.full((count,), steps)
    running, before, products = torch.arange(count), torch.zeros_like(vectors), 0
    spare = torch.empty_like(vectors)  # fresh memory of this size takes as long as three passes over it
    betas, scale = torch.zeros(count, dtype=F64), torch.zeros(count, dtype=F64)
    for step in range(steps):
        product, following = images(operator, vectors), spare[: len(vectors)]
        products += len(vectors)
        back = row_dots(before, product).cpu()
        _check_symmetry(back, betas, scale, vectors.dtype)
        following.copy_(product).addcmul_(back.to(vectors)[:, None], before, value=-1)
        del product
        alphas = row_dots(vectors, following).cpu()
        following.addcmul_(alphas.to(vectors)[:, None], vectors, value=-1)
        betas = norms(following).cpu()
        made[running, step, step] = alphas
        scale = torch.maximum(scale, alphas.abs() + betas)
        if bool((betas < eps**0.25 * scale).any()):
            # What is left holds the rounding of what was taken away, along the last two vectors as well; two such steps
            # together leave eps (scale / β)² of it, which may look like asymmetry. So take that away, too.
            for known in (before, vectors):
                following.addcmul_(row_dots(known, following).to(vectors)[:, None], known, value=-1)
            betas = norms(following).cpu()
        ended = ~(betas > 10 * eps * scale) | ~torch.isfinite(betas)
        lengths[running[ended]] = step + 1
        made[running, step, step + 1] = made[running, step + 1, step] = betas.where(~ended, 0.0)
        if step + 1 == steps or bool(ended.all()):
            break
        if bool(ended.any()):
            at = (~ended).nonzero()[:, 0]
            running, betas, scale = running[at], betas[at], scale[at]
            vectors, following = vectors[at.to(vectors.device)], following[at.to(vectors.device)]
        if settled is not None and settled(_leading(made, lengths.clamp(max=step + 1))):
            lengths.clamp_(max=step + 1)
            break
        spare, before, vectors = before, vectors, following.div_(betas.to(vectors)[:, None])
    return _leading(made, lengths), products


def _leading(made: Tensor, lengths: Tensor) -> list[Tensor]:
    """The leading blocks (k, k + 1) of matrices, k from ``lengths``."""
    return [T[:k, : k + 1] for T, k in zip(made, lengths.tolist(), strict=True)]


def _check_symmetry(back: Tensor, betas: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Raise where a product with the last vector is not what the last product had with this one."""
    relative = (back - betas).abs() / torch.maximum(scale, back.abs())  # nan where all is zero, which is symmetric
    if bool((relative > tolerance(dtype)).any()):
        raise asymmetric(float(relative.nan_to_num(nan=0.0).max()))


def _all_eigenvalues(operator: LinearOperator) -> Quadrature:
    identity = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    matrix = images(operator, identity).to(F64).cpu()
    if not bool(torch.isfinite(matrix).all()):
        return Quadrature([], matrix.diagonal() * torch.nan, operator.size, finite=False)
    return Quadrature([], torch.linalg.eigvalsh(symmetric_part(matrix, operator.dtype)), operator.size)
