"""CG ends at the first disturbing direction, and never on positive definite matrices: planted spectra of any kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from imstep.linalg import DenseOperator, DiagonalOperator, KrylovStatus, RelativeResidual, conjugate_gradient

F64 = torch.float64
NEGATIVE = KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
Plant = Callable[..., tuple[Tensor, Tensor]]


def first_disturbing(matrix: Tensor, rhs: Tensor, floor: float, metric: Tensor) -> tuple[int, Tensor, float] | None:
    """Textbook CG with a diagonal preconditioner: the number, direction and margin of the first pᵀAp <= floor ‖p‖²."""
    x, r = torch.zeros_like(rhs), rhs.clone()
    z = metric * r
    p = z.clone()
    margin = float("inf")
    for iteration in range(len(rhs)):
        curvature, squared = float(p @ matrix @ p), float(p @ p)
        margin = min(margin, abs(curvature - floor * squared) / squared)
        if curvature <= floor * squared:
            return iteration, p, margin
        step = float(r @ z) / curvature
        x, new = x + step * p, r - step * (matrix @ p)
        if new.norm() <= 1e-10 * rhs.norm():
            return None
        p = metric * new + float(new @ (metric * new)) / float(r @ z) * p
        r, z = new, metric * new
    return None


SIZES = st.floats(0.01, 10) | st.floats(-10, -0.01)


@given(
    values=st.lists(SIZES, min_size=1, max_size=12),
    floor=st.sampled_from([0.0, 0.0, 0.3]),
    seed=st.integers(0, 1000),
    preconditioned=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_it_ends_at_the_first_direction_below_the_floor(
    with_spectrum: Plant, values: list[float], floor: float, seed: int, preconditioned: bool
) -> None:
    n = len(values)
    matrix, _ = with_spectrum(values, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rhs = torch.randn(n, dtype=F64, generator=generator)
    metric = 0.5 + torch.rand(n, dtype=F64, generator=generator) if preconditioned else torch.ones(n, dtype=F64)
    expected = first_disturbing(matrix, rhs, floor, metric)
    result = conjugate_gradient(
        DenseOperator(matrix),
        rhs,
        curvature_floor=floor,
        preconditioner=DiagonalOperator(metric) if preconditioned else None,
        stopping=[RelativeResidual(1e-10)],
        max_iterations=n,
    )
    if expected is None:
        assert result.status is not NEGATIVE
        return
    iteration, direction, margin = expected
    assume(margin > 1e-6)  # nearer to the floor rounding decides
    assert result.status is NEGATIVE
    assert (result.iterations, result.products) == (iteration, iteration + 1)
    cosine = float(result.disturbing_direction @ direction / direction.norm() / result.disturbing_direction.norm())
    assert cosine == pytest.approx(1, abs=1e-4)
    p = result.disturbing_direction
    assert float(p @ matrix @ p) <= floor * float(p @ p)


@given(
    low=st.floats(-6, 0),
    n=st.integers(1, 60),
    seed=st.integers(0, 1000),
    clusters=st.integers(1, 5) | st.none(),
    dtype=st.sampled_from([F64, torch.float32]),
    damping=st.sampled_from([0.0, 1e-3]),
)
@example(low=-6.0, n=60, seed=0, clusters=None, dtype=F64, damping=0.0)
@settings(deadline=None, max_examples=100)
def test_it_never_ends_so_on_positive_definite_matrices(
    with_spectrum: Plant,
    low: float,
    n: int,
    seed: int,
    clusters: int | None,
    dtype: torch.dtype,
    damping: float,
) -> None:
    """Also long after convergence, where nothing but rounding is left of the residual."""
    low = max(low, -3.0) if dtype is torch.float32 else low
    values = torch.logspace(low, 0, n, dtype=F64)
    values = values if clusters is None else values[torch.arange(n) * clusters // n * (n // clusters or 1) % n]
    matrix, _ = with_spectrum(values, seed=seed)
    rhs = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    result = conjugate_gradient(
        DenseOperator(matrix.to(dtype)),
        rhs,
        damping=damping,
        curvature_floor=0.5 * 10**low,
        stopping=[],
        max_iterations=300,
    )
    assert result.status in (KrylovStatus.CONVERGED, KrylovStatus.MAX_ITERATIONS)
    assert float((rhs - matrix.to(dtype) @ result.solution - damping * result.solution).norm()) < 0.1 * rhs.norm()


@pytest.mark.parametrize("position", [0, 5, 11])
@pytest.mark.parametrize("lowest", [-3.0, -1e-2, -1e-6])
def test_a_single_negative_eigenvalue_is_met_before_the_space_is_exhausted(
    with_spectrum: Plant, lowest: float, position: int
) -> None:
    values = torch.linspace(1.0, 3.0, 12, dtype=F64)
    values[position] = lowest
    matrix, vectors = with_spectrum(values, seed=position)
    result = conjugate_gradient(
        DenseOperator(matrix), torch.ones(12, dtype=F64), stopping=[RelativeResidual(1e-12)], max_iterations=50
    )
    assert result.status is NEGATIVE
    assert result.iterations < 12
    p = result.disturbing_direction / result.disturbing_direction.norm()
    assert float((p @ vectors[:, position]) ** 2) > 0.1  # it has found the planted vector
