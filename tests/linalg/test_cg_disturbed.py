"""CG that must not go on: negative curvature, noise, boundary, numbers that are not finite."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg_cases import Failing

from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    NoiseTest,
    RelativeResidual,
    SplitOperator,
    conjugate_gradient,
)

NEGATIVE = KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("position", [0, 3, 9])
def test_a_planted_eigenvector_ends_the_solve_at_itself(with_spectrum, dtype, position):
    values = torch.linspace(1.0, 10.0, 10, dtype=F64)
    values[position] = -2.0
    matrix, vectors = with_spectrum(values)
    result = conjugate_gradient(DenseOperator(matrix.to(dtype)), vectors[:, position].to(dtype))
    assert result.status is NEGATIVE
    assert (result.iterations, result.products) == (0, 1)
    assert result.solution.equal(torch.zeros(10, dtype=dtype))
    assert result.disturbing_curvature == pytest.approx(-2.0, rel=1e-5)
    torch.testing.assert_close(result.disturbing_direction, vectors[:, position].to(dtype))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("negative", [1, 3])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_planted_negative_eigenvalues_end_the_solve_in_time(
    with_spectrum, normal, seed, negative, preconditioned
):
    values = torch.cat([torch.linspace(-3.0, -1.0, negative), torch.logspace(-1, 1, 40)])
    matrix, _ = with_spectrum(values, seed=seed)
    rhs = normal(values.numel(), seed=seed + 1)
    preconditioner = DiagonalOperator(1 + normal(values.numel()).abs()) if preconditioned else None
    result = conjugate_gradient(
        DenseOperator(matrix), rhs, preconditioner=preconditioner, stopping=[RelativeResidual(1e-10)]
    )
    p = result.disturbing_direction
    assert result.status is NEGATIVE
    assert result.disturbing_curvature == pytest.approx((p @ matrix @ p).item(), rel=1e-8, abs=1e-8)
    assert result.disturbing_curvature <= 0
    assert result.products == result.iterations + 1
    x = result.solution
    if result.iterations > 0:
        assert (rhs @ x).item() > 0
        assert (x @ matrix @ x).item() > 0
        assert result.predicted_decrease == pytest.approx((rhs @ x - x @ matrix @ x / 2).item(), rel=1e-8)
        assert abs((p @ matrix @ x).item()) < 1e-6 * p.norm() * x.norm() * 10  # conjugate to all before


def test_enough_damping_makes_the_system_definite(with_spectrum, normal):
    matrix, _ = with_spectrum([-2.0, 1.0, 4.0])
    assert conjugate_gradient(DenseOperator(matrix), normal(3), damping=1.9).status is NEGATIVE
    result = conjugate_gradient(DenseOperator(matrix), normal(3), damping=2.5)
    assert result.status is KrylovStatus.CONVERGED
    assert result.predicted_decrease > result.damped_decrease


def test_disturbing_curvature_is_reported_without_damping():
    result = conjugate_gradient(DenseOperator(-3 * torch.eye(2)), torch.tensor([1.0, 0.0]), damping=1.0)
    assert result.disturbing_curvature == pytest.approx(-3.0)


def test_the_floor_is_per_squared_norm_of_the_direction():
    operator = DiagonalOperator(torch.tensor([0.01, 1.0]))
    for size in (1e-6, 1.0, 1e6):
        rhs = torch.tensor([size, 0.0])
        below, above = (
            conjugate_gradient(operator, rhs, curvature_floor=floor).status for floor in (0.02, 0.005)
        )
        assert (below, above) == (NEGATIVE, KrylovStatus.CONVERGED)


def test_the_floor_is_euclidean_with_a_preconditioner():
    operator = DiagonalOperator(torch.tensor([0.01, 1.0]))
    preconditioner = DiagonalOperator(torch.tensor([1e4, 1e4]))
    result = conjugate_gradient(
        operator, torch.tensor([1.0, 0.0]), curvature_floor=0.005, preconditioner=preconditioner
    )
    assert result.status is KrylovStatus.CONVERGED


def test_vanishing_curvature_disturbs():
    assert conjugate_gradient(DenseOperator(torch.zeros(2, 2)), torch.ones(2)).status is NEGATIVE
    skew = DenseOperator(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))  # pᵀAp = 0 exactly, A p large
    assert conjugate_gradient(skew, torch.tensor([1.0, 0.0])).status is NEGATIVE


@pytest.mark.parametrize(
    ("z", "expected"), [(1.0, KrylovStatus.CONVERGED), (2.5, KrylovStatus.DISTURBING_NOISE)]
)
def test_halves_that_disagree_are_noise(z, expected):
    halves = DiagonalOperator(torch.tensor([1.0, 1.0])), DiagonalOperator(torch.tensor([1.0, 3.0]))
    result = conjugate_gradient(SplitOperator(*halves), torch.tensor([0.0, 1.0]), noise=NoiseTest(z=z))
    assert result.status is expected
    if expected.disturbing:
        assert result.disturbing_curvature == pytest.approx(2.0)
        assert result.disturbing_direction.equal(torch.tensor([0.0, 1.0]))
        assert result.solution.equal(torch.zeros(2))


def test_damping_that_outweighs_the_noise_restores_trust():
    split = SplitOperator(DiagonalOperator(torch.tensor([-1.0])), DiagonalOperator(torch.tensor([3.0])))
    rhs = torch.ones(1)
    assert conjugate_gradient(split, rhs, noise=NoiseTest()).status is KrylovStatus.DISTURBING_NOISE
    assert conjugate_gradient(split, rhs, noise=NoiseTest(), damping=1.5).status is KrylovStatus.CONVERGED


def test_equal_halves_change_nothing(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-2, 1, 20))
    half = DenseOperator(matrix)
    plain = conjugate_gradient(half, normal(20), damping=0.1)
    split = conjugate_gradient(SplitOperator(half, half), normal(20), damping=0.1, noise=NoiseTest())
    assert split.status is plain.status is KrylovStatus.CONVERGED
    assert split.products == plain.products
    torch.testing.assert_close(split.solution, plain.solution)


def test_the_noise_test_needs_halves():
    with pytest.raises(TypeError, match="has no halves"):
        conjugate_gradient(DenseOperator(torch.eye(2)), torch.ones(2), noise=NoiseTest())
    with pytest.raises(ValueError, match="noise=None"):
        NoiseTest(z=0.0)


@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_boundary_ends_the_solve_on_it(with_spectrum, normal, radius, damping):
    matrix, _ = with_spectrum(torch.logspace(-2, 0, 20))
    rhs = normal(20)
    result = conjugate_gradient(DenseOperator(matrix), rhs, radius=radius, damping=damping)
    x = result.solution
    assert result.status is KrylovStatus.BOUNDARY
    assert x.norm().item() == pytest.approx(radius, rel=1e-12)
    assert result.predicted_decrease == pytest.approx((rhs @ x - x @ matrix @ x / 2).item(), rel=1e-10)
    assert result.residual_norm == pytest.approx((rhs - matrix @ x - damping * x).norm().item(), rel=1e-10)
    cauchy = radius * rhs / rhs.norm()
    if damping == 0:  # at least the decrease of the Cauchy point (Nocedal & Wright, Theorem 4.4's premise)
        assert result.predicted_decrease >= (rhs @ cauchy - cauchy @ matrix @ cauchy / 2).item() * (1 - 1e-12)


def test_a_large_radius_changes_nothing(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-1, 0, 20))
    free, bounded = (conjugate_gradient(DenseOperator(matrix), normal(20), radius=r) for r in (None, 1e6))
    assert free.status is bounded.status is KrylovStatus.CONVERGED
    assert free.solution.equal(bounded.solution)


@pytest.mark.parametrize("seed", range(4))
def test_negative_curvature_is_followed_to_the_boundary(with_spectrum, normal, seed):
    matrix, _ = with_spectrum([-1.0, *torch.linspace(0.5, 2.0, 15).tolist()], seed=seed)
    rhs = normal(16, seed=seed)
    free = conjugate_gradient(DenseOperator(matrix), rhs)
    result = conjugate_gradient(DenseOperator(matrix), rhs, radius=100.0)
    assert free.status is result.status is NEGATIVE
    assert result.solution.norm().item() == pytest.approx(100.0, rel=1e-12)
    assert result.predicted_decrease > free.predicted_decrease
    assert result.damped_decrease == result.decreases[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_product_that_is_not_finite_keeps_the_last_finite_iterate(value, fails_at):
    diagonal = torch.linspace(1.0, 5.0, 8)
    result = conjugate_gradient(Failing(diagonal, fails_at, value), torch.ones(8))
    expected = conjugate_gradient(DiagonalOperator(diagonal), torch.ones(8), max_iterations=fails_at - 1)
    assert result.status is KrylovStatus.NON_FINITE
    assert result.products == fails_at
    assert result.solution.equal(expected.solution)
    assert result.image.isfinite().all()
    assert math.isfinite(result.predicted_decrease)


def test_other_sources_of_non_finite_numbers():
    operator = DenseOperator(torch.eye(2))
    nan = torch.tensor([1.0, math.nan])
    for result in (
        conjugate_gradient(operator, nan),
        conjugate_gradient(operator, torch.ones(2), x0=nan),
        conjugate_gradient(operator, torch.ones(2), preconditioner=DiagonalOperator(nan)),
        conjugate_gradient(
            Failing(torch.tensor([1.0, 2.0]), fails_at=2), torch.ones(2), recompute_residual_every=1
        ),
        # A step of 1e40 along the first direction is beyond float32.
        conjugate_gradient(DiagonalOperator(torch.tensor([1e-40, 1.0])), torch.tensor([1e18, 0.0])),
    ):
        assert result.status is KrylovStatus.NON_FINITE
        assert result.solution.isfinite().all()


def test_every_status_has_a_message_and_a_word():
    assert {status.name.lower() for status in KrylovStatus} == {
        "converged",
        "disturbing_negative_curvature",
        "disturbing_noise",
        "enough",
        "breakdown",
        "boundary",
        "least_squares",
        "max_iterations",
        "non_finite",
    }
    assert len({status.message for status in KrylovStatus}) == len(KrylovStatus)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 10),
    seed=st.integers(0, 10_000),
    shift=st.floats(-3, 3),
    radius=st.none() | st.floats(0.01, 10),
)
def test_any_symmetric_system_ends_in_a_certificate(n, seed, shift, radius):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=F64)
    matrix = (root + root.T) / 2 + shift * torch.eye(n, dtype=F64)
    rhs = torch.randn(n, generator=generator, dtype=F64)
    result = conjugate_gradient(DenseOperator(matrix), rhs, radius=radius)
    x, p = result.solution, result.disturbing_direction
    assert result.predicted_decrease >= 0
    assert radius is None or x.norm() <= radius * (1 + 1e-12)
    if result.status is KrylovStatus.CONVERGED:
        assert (rhs - matrix @ x).norm() <= 1.1e-5 * rhs.norm() + 1e-10 * x.norm()
    elif result.status is NEGATIVE:
        assert (p @ matrix @ p).item() <= 1e-12 * (p @ p).item() * matrix.norm().item()
    else:
        assert result.status in (KrylovStatus.BOUNDARY, KrylovStatus.MAX_ITERATIONS)


def test_a_result_shares_no_memory_with_its_arguments():
    rhs, x0 = torch.ones(3), torch.full((3,), 0.1)
    for result in (
        conjugate_gradient(DenseOperator(-torch.eye(3)), rhs),
        conjugate_gradient(DenseOperator(-torch.eye(3)), rhs, x0=x0),
    ):
        for part in (result.solution, result.image, result.disturbing_direction):
            part.fill_(7.0)
    assert rhs.equal(torch.ones(3))
    assert x0.equal(torch.full((3,), 0.1))
