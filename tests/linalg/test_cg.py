"""CG on definite systems: certificates, SciPy, recurrences, float32."""

import math

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    RelativeResidual,
    conjugate_gradient,
)

F64 = torch.float64


def residual_ratio(matrix, rhs, result, damping=0.0):
    residual = rhs - matrix @ result.solution - damping * result.solution
    return (residual.norm() / rhs.norm()).item()


@pytest.mark.parametrize("damping", [0.0, 1e-2, 10.0])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_solution_and_every_reported_number(with_spectrum, normal, damping, preconditioned, warm):
    matrix, _ = with_spectrum(torch.logspace(-3, 1, 50))
    rhs = normal(50)
    preconditioner = DiagonalOperator(1 / (matrix.diag() + damping)) if preconditioned else None
    result = conjugate_gradient(
        DenseOperator(matrix),
        rhs,
        damping=damping,
        preconditioner=preconditioner,
        stopping=[RelativeResidual(1e-9)],
        x0=normal(50, seed=5) if warm else None,
    )
    x = result.solution
    assert result.status is KrylovStatus.CONVERGED
    assert residual_ratio(matrix, rhs, result, damping) < 2e-9
    torch.testing.assert_close(
        x, torch.linalg.solve(matrix + damping * torch.eye(50, dtype=F64), rhs), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(result.image, matrix @ x, rtol=1e-8, atol=1e-8)
    assert result.curvature == pytest.approx((x @ matrix @ x).item(), rel=1e-8)
    undamped = (rhs @ x - x @ matrix @ x / 2).item()
    assert result.predicted_decrease == pytest.approx(undamped, rel=1e-8)
    assert result.damped_decrease == pytest.approx(undamped - damping * (x @ x).item() / 2, rel=1e-8)
    assert result.products == result.iterations + warm
    assert len(result.decreases) == result.iterations + 1
    assert result.decreases[-1] == result.damped_decrease
    assert list(result.decreases) == sorted(result.decreases)
    assert result.disturbing_direction is None
    assert result.disturbing_curvature is None


def test_every_truncated_iterate_reports_its_own_numbers(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-2, 1, 30))
    rhs = normal(30)
    for limit in range(1, 12):
        result = conjugate_gradient(DenseOperator(matrix), rhs, damping=0.1, max_iterations=limit)
        x = result.solution
        assert result.status is KrylovStatus.MAX_ITERATIONS
        assert result.iterations == result.products == limit
        assert result.residual_norm == pytest.approx((rhs - matrix @ x - 0.1 * x).norm().item(), rel=1e-10)
        assert result.predicted_decrease == pytest.approx((rhs @ x - x @ matrix @ x / 2).item(), rel=1e-12)
        assert (rhs @ x).item() >= (rhs @ rhs).item() / (10 + 0.1) * (1 - 1e-12)  # descent, DESIGN's bound


def test_iterates_are_those_of_scipy(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-1, 1, 40))
    rhs = normal(40)
    preconditioner = DiagonalOperator(1 / matrix.diag())
    for limit in (1, 5, 20):
        expected, _ = scipy.sparse.linalg.cg(
            matrix.numpy(), rhs.numpy(), rtol=0.0, maxiter=limit, M=preconditioner.to_scipy()
        )
        result = conjugate_gradient(
            DenseOperator(matrix), rhs, preconditioner=preconditioner, max_iterations=limit, stopping=()
        )
        torch.testing.assert_close(result.solution, torch.as_tensor(expected), rtol=1e-9, atol=1e-9)


def test_as_many_iterations_as_distinct_eigenvalues(with_spectrum, normal):
    matrix, _ = with_spectrum([1.0] * 20 + [2.0] * 20 + [7.0] * 20)
    result = conjugate_gradient(DenseOperator(matrix), normal(60), stopping=[RelativeResidual(1e-10)])
    assert result.iterations == 3


@pytest.mark.parametrize("limit", [1, 4, 200])
def test_the_preconditioner_is_applied_once_a_product(with_spectrum, normal, limit):
    matrix, _ = with_spectrum(torch.logspace(-2, 1, 30))
    preconditioner = DiagonalOperator(1 / matrix.diag())
    applied, apply = [], preconditioner.matvec
    preconditioner.matvec = lambda vector: applied.append(vector) or apply(vector)
    result = conjugate_gradient(
        DenseOperator(matrix),
        normal(30),
        preconditioner=preconditioner,
        max_iterations=limit,
        stopping=[RelativeResidual(1e-6)],
    )
    assert len(applied) == result.products == result.iterations


def test_the_exact_inverse_as_preconditioner_needs_one_iteration(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-4, 2, 30))
    inverse = DenseOperator(torch.linalg.inv(matrix + 0.1 * torch.eye(30, dtype=F64)))
    result = conjugate_gradient(DenseOperator(matrix), normal(30), damping=0.1, preconditioner=inverse)
    assert (result.status, result.iterations) == (KrylovStatus.CONVERGED, 1)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_float32_converges_without_spurious_statuses(with_spectrum, normal, condition, scale):
    matrix, _ = with_spectrum(torch.logspace(0, -math.log10(condition), 100))
    result = conjugate_gradient(DenseOperator(matrix.float() * scale), normal(100).float())
    assert result.status is KrylovStatus.CONVERGED
    error = result.solution.double() * scale - torch.linalg.solve(matrix, normal(100))
    decrease_lost = (error @ matrix @ error) / (normal(100) @ torch.linalg.solve(matrix, normal(100)))
    assert decrease_lost < 1e-7 * condition


@pytest.mark.parametrize("seed", range(5))
def test_float32_singular_but_consistent_system_converges(with_spectrum, normal, seed):
    values = torch.cat([torch.zeros(60), torch.logspace(-2, 0, 40)])
    matrix, _ = with_spectrum(values, seed=seed)
    rhs = matrix @ normal(100, seed=seed + 10)
    result = conjugate_gradient(DenseOperator(matrix.float()), rhs.float())
    assert result.status is KrylovStatus.CONVERGED
    assert residual_ratio(matrix.float(), rhs.float(), result) < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_refreshing_the_residual_gives_a_true_residual(with_spectrum, normal, seed):
    matrix, _ = with_spectrum(torch.logspace(0, -4, 200), seed=seed)
    rhs = normal(200, seed=seed).float()
    kept, refreshed = (
        conjugate_gradient(
            DenseOperator(matrix.float()),
            rhs,
            stopping=[RelativeResidual(1e-3)],
            recompute_residual_every=every,
        )
        for every in (None, 20)
    )
    assert kept.status is refreshed.status is KrylovStatus.CONVERGED
    assert refreshed.products == refreshed.iterations + refreshed.iterations // 20
    true = (rhs.double() - matrix @ refreshed.solution.double()).norm() / rhs.norm()
    assert true < 1.5e-3


def test_refreshing_beyond_attainable_accuracy_does_not_diverge(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(0, -4, 200))
    result = conjugate_gradient(
        DenseOperator(matrix.float()),
        normal(200).float(),
        stopping=[RelativeResidual(1e-12)],
        recompute_residual_every=50,
    )
    assert result.status is KrylovStatus.MAX_ITERATIONS
    exact = normal(200) @ torch.linalg.solve(matrix, normal(200)) / 2
    assert result.predicted_decrease == pytest.approx(exact.item(), rel=1e-3)


def test_a_zero_right_hand_side_is_solved_without_a_product():
    result = conjugate_gradient(DenseOperator(torch.eye(3)), torch.zeros(3), x0=torch.ones(3))
    assert (result.status, result.products) == (KrylovStatus.CONVERGED, 0)
    assert result.solution.equal(torch.zeros(3))


def test_a_warm_start_at_the_solution_costs_one_product():
    result = conjugate_gradient(DenseOperator(2 * torch.eye(3)), torch.ones(3), x0=torch.full((3,), 0.5))
    assert (result.status, result.products, result.iterations) == (KrylovStatus.CONVERGED, 1, 0)
    assert result.predicted_decrease == pytest.approx(0.75)


def test_arguments_are_left_alone(with_spectrum, normal):
    matrix, _ = with_spectrum([1.0, 2.0, 3.0])
    rhs, x0 = normal(3), normal(3, seed=2)
    copies = rhs.clone(), x0.clone()
    first = conjugate_gradient(DenseOperator(matrix), rhs, x0=x0, damping=0.1)
    second = conjugate_gradient(DenseOperator(matrix), rhs, x0=x0, damping=0.1)
    assert rhs.equal(copies[0])
    assert x0.equal(copies[1])
    assert first.solution.equal(second.solution)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"damping": -1.0}, ValueError, "damping"),
        ({"damping": math.nan}, ValueError, "damping"),
        ({"curvature_floor": -1e-3}, ValueError, "curvature_floor"),
        ({"radius": 0.0}, ValueError, "radius"),
        ({"radius": 1.0, "x0": torch.ones(3)}, ValueError, "inside the radius"),
        ({"max_iterations": -1}, ValueError, "max_iterations"),
        ({"keep_pairs": -1}, ValueError, "keep_pairs"),
        ({"keep_iterates": 1.0}, ValueError, "keep_iterates"),
        ({"recompute_residual_every": 0}, ValueError, "For never pass None"),
        ({"x0": torch.ones(4)}, ValueError, r"\(3,\)"),
        ({"preconditioner": DiagonalOperator(torch.ones(2))}, ValueError, "agree in size"),
        ({"preconditioner": DiagonalOperator(-torch.ones(3))}, ValueError, "not positive definite"),
    ],
)
def test_misuse_is_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        conjugate_gradient(DenseOperator(torch.eye(3)), torch.ones(3), **arguments)


@pytest.mark.parametrize("disturbed", [False, True])
def test_iterates_at_growing_intervals_are_those_of_shorter_solves(with_spectrum, normal, disturbed):
    values = torch.logspace(-1, 1, 30)
    matrix, _ = with_spectrum(torch.cat([torch.tensor([-1e-3]), values]) if disturbed else values)
    rhs, rules = normal(len(matrix)), [RelativeResidual(1e-8)]
    result = conjugate_gradient(DenseOperator(matrix), rhs, stopping=rules, keep_iterates=1.3)
    numbers = sorted({math.ceil(1.3**j) for j in range(20)})
    numbers = [number for number in numbers if number < result.iterations]
    assert len(result.iterates) == len(numbers) > 5
    for number, (solution, image) in zip(numbers, result.iterates, strict=True):
        shorter = conjugate_gradient(DenseOperator(matrix), rhs, stopping=(), max_iterations=number)
        torch.testing.assert_close(solution, shorter.solution)
        torch.testing.assert_close(image, matrix @ solution)


def test_a_block_of_right_hand_sides_is_refused():
    with pytest.raises(ValueError, match="column by column"):
        conjugate_gradient(DenseOperator(torch.eye(3)), torch.ones(3, 2))


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 12), seed=st.integers(0, 10_000), damping=st.floats(0, 10), scale=st.floats(1e-6, 1e6)
)
def test_definite_systems_are_solved(n, seed, damping, scale):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, 2 * n, generator=generator, dtype=F64)
    matrix = scale * (root @ root.T / n + 0.1 * torch.eye(n, dtype=F64))
    rhs = torch.randn(n, generator=generator, dtype=F64)
    result = conjugate_gradient(
        DenseOperator(matrix), rhs, damping=damping * scale, stopping=[RelativeResidual(1e-8)]
    )
    assert result.status is KrylovStatus.CONVERGED
    assert residual_ratio(matrix, rhs, result, damping * scale) < 1e-7
    assert result.predicted_decrease >= result.damped_decrease > 0
