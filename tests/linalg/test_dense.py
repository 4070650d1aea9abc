"""Direct solvers: Cholesky, repaired spectra, the exact trust region."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg_cases import Counted, assert_optimal
from scipy.optimize._trustregion_exact import IterativeSubproblem

from imstep.linalg import (
    AbsoluteEigenvalues,
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    ShiftedEigenvalues,
    dense_solve,
    dense_trust_region,
    sketched_newton,
    steihaug_toint,
)

F64 = torch.float64
NEGATIVE = KrylovStatus.DISTURBING_NEGATIVE_CURVATURE


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_a_definite_system_and_every_reported_number(with_spectrum, normal, damping):
    matrix, _ = with_spectrum(torch.logspace(-4, 1, 30))
    operator, rhs = Counted(matrix), normal(30)
    result = dense_solve(operator, rhs, damping=damping)
    x = result.solution
    assert result.status is KrylovStatus.CONVERGED
    expected = scipy.linalg.solve((matrix + damping * torch.eye(30)).numpy(), rhs.numpy(), assume_a="pos")
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result.image, matrix @ x, rtol=1e-9, atol=1e-9)
    assert result.curvature == pytest.approx((x @ matrix @ x).item(), rel=1e-9)
    assert result.predicted_decrease == pytest.approx((rhs @ x - x @ matrix @ x / 2).item(), rel=1e-9)
    assert result.damped_decrease == pytest.approx((rhs @ x).item() / 2, rel=1e-9)
    assert result.decreases == (0.0, result.damped_decrease)
    assert result.products == operator.products == 30
    assert result.residual_norm <= 1e-10 * rhs.norm()
    assert result.multiplier is None


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_an_indefinite_matrix_is_shifted(with_spectrum, normal, damping):
    matrix, vectors = with_spectrum([-2.0, *torch.linspace(0.1, 4.0, 19).tolist()])
    rhs = normal(20)
    result = dense_solve(DenseOperator(matrix), rhs, damping=damping, indefinite=ShiftedEigenvalues(least=0.1))
    x, p = result.solution, result.disturbing_direction
    assert result.status is NEGATIVE
    assert result.multiplier == pytest.approx(2.0 - damping + 0.1 * (4.0 + damping))
    raised = matrix + (damping + result.multiplier) * torch.eye(20, dtype=F64)
    torch.testing.assert_close(raised @ x, rhs, rtol=1e-10, atol=1e-10)
    assert result.residual_norm < 1e-10
    assert result.disturbing_curvature == pytest.approx(-2.0)
    torch.testing.assert_close(result.disturbing_image, matrix @ p)
    assert abs((p @ vectors[:, 0]).item()) == pytest.approx(1.0)
    assert (rhs @ p).item() > 0
    assert (rhs @ x).item() > 0


def test_absolute_eigenvalues_are_those_of_saddle_free_newton(with_spectrum, normal):
    matrix, vectors = with_spectrum([-5.0, -0.1, 0.0, 0.3, 7.0])
    rhs = normal(5)
    result = dense_solve(DenseOperator(matrix), rhs, indefinite=AbsoluteEigenvalues(least=1e-3))
    expected = vectors @ (vectors.T @ rhs / torch.tensor([5.0, 0.1, 7e-3, 0.3, 7.0], dtype=F64))
    assert (result.status, result.multiplier) == (NEGATIVE, None)
    torch.testing.assert_close(result.solution, expected)
    assert result.residual_norm == pytest.approx((rhs - matrix @ expected).norm().item())
    assert result.predicted_decrease == pytest.approx((rhs @ expected - expected @ matrix @ expected / 2).item())


def test_the_rule_does_not_touch_definite_systems(with_spectrum, normal):
    matrix, _ = with_spectrum([0.01, 1.0, 3.0])
    results = [
        dense_solve(DenseOperator(matrix), normal(3), indefinite=rule(least=1.0))
        for rule in (ShiftedEigenvalues, AbsoluteEigenvalues)
    ]
    assert results[0].solution.equal(results[1].solution)
    assert results[0].status is KrylovStatus.CONVERGED


@pytest.mark.parametrize(
    ("floor", "status"), [(0.0, KrylovStatus.CONVERGED), (0.09, KrylovStatus.CONVERGED), (0.2, NEGATIVE)]
)
def test_the_floor_bounds_the_least_eigenvalue(with_spectrum, normal, floor, status):
    matrix, _ = with_spectrum([0.1, 1.0, 3.0])
    assert dense_solve(DenseOperator(matrix), normal(3), curvature_floor=floor).status is status


def test_rounding_does_not_make_a_matrix_definite(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.cat([torch.zeros(10), torch.linspace(1.0, 2.0, 10)]))
    result = dense_solve(DenseOperator(matrix), normal(20))
    assert result.status is NEGATIVE
    assert result.disturbing_curvature == pytest.approx(0.0, abs=1e-14)
    assert result.solution.norm() < 1e4


@pytest.mark.parametrize("solve", [dense_solve, lambda A, b: dense_trust_region(A, b, 1.0)])
def test_values_and_types_of_trivial_systems(solve):
    zero = solve(DenseOperator(torch.eye(3)), torch.zeros(3))
    assert zero.status is KrylovStatus.CONVERGED
    assert zero.solution.equal(torch.zeros(3))
    one = solve(DenseOperator(4 * torch.eye(1)), torch.ones(1))
    assert one.solution.equal(torch.full((1,), 0.25))
    for operator, rhs in (
        (DenseOperator(torch.eye(2)), torch.tensor([1.0, math.nan])),
        (DiagonalOperator(torch.tensor([1.0, math.inf])), torch.ones(2)),
    ):
        result = solve(operator, rhs)
        assert result.status is KrylovStatus.NON_FINITE
        assert result.solution.equal(torch.zeros(2))
        assert (result.predicted_decrease, result.iterations) == (0.0, 0)


def test_a_matrix_of_zeros_gives_the_right_hand_side():
    result = dense_solve(DenseOperator(torch.zeros(2, 2)), torch.tensor([3.0, 4.0]))
    assert (result.status, result.disturbing_curvature) == (NEGATIVE, 0.0)
    assert result.solution.equal(torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A, b: dense_solve(A, b, damping=-1.0), "damping"),
        (lambda A, b: dense_solve(A, b, curvature_floor=math.inf), "curvature_floor"),
        (lambda A, b: dense_solve(A, b, limit=2), "limit is 2"),
        (lambda A, b: dense_solve(A, torch.ones(3, 2)), "dense_solve solves for one vector"),
        (lambda A, b: dense_trust_region(A, b, 0.0), "radius must be positive"),
        (lambda A, b: dense_trust_region(A, b, math.inf), "conjugate_gradient"),
        (lambda A, b: dense_trust_region(A, b, 1.0, damping=-1.0), "damping"),
        (lambda A, b: ShiftedEigenvalues(least=0.0), "least"),
        (lambda A, b: AbsoluteEigenvalues(least=2.0), "least"),
    ],
)
def test_misuse_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call(DenseOperator(torch.eye(3)), torch.ones(3))


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("radius", [1e-3, 0.5, 1.5, 40.0])
@pytest.mark.parametrize("least", [-3.0, -1e-9, 0.0, 0.4])
def test_the_trust_region_problem_is_solved_globally(with_spectrum, normal, least, radius, damping):
    matrix, _ = with_spectrum([least, *torch.linspace(0.5, 6.0, 15).tolist()])
    operator, rhs = Counted(matrix), normal(16)
    result = dense_trust_region(operator, rhs, radius, damping=damping)
    assert_optimal(matrix, rhs, radius, result, damping=damping, accuracy=1e-12)
    x = result.solution
    assert result.products == operator.products == 16
    assert result.status is (KrylovStatus.BOUNDARY if result.multiplier > 0 else KrylovStatus.CONVERGED)
    assert result.damped_decrease == pytest.approx(
        (rhs @ x - x @ matrix @ x / 2 - damping * x @ x / 2).item(), rel=1e-10
    )
    shifted = matrix + damping * torch.eye(16, dtype=F64)
    reference = IterativeSubproblem(
        np.zeros(16), lambda _: 0.0, lambda _: -rhs.numpy(), lambda _: shifted.numpy(), k_easy=1e-10, k_hard=1e-10
    )
    p, on_boundary = reference.solve(radius)
    assert on_boundary == (result.multiplier > 0)
    np.testing.assert_allclose(x.numpy(), p, rtol=1e-4, atol=1e-4 * radius)
    assert result.damped_decrease >= float(rhs.numpy() @ p - p @ shifted.numpy() @ p / 2) * (1 - 1e-9)


@pytest.mark.parametrize("multiplicity", [1, 3])
@pytest.mark.parametrize("part", [0.0, 1e-30, 1e-16, 1e-8])
def test_the_hard_case(with_spectrum, normal, multiplicity, part):
    """b has no part along the least eigenvalue, or next to none."""
    values = torch.cat([torch.full((multiplicity,), -2.0), torch.linspace(-1.0, 5.0, 12)])
    matrix, vectors = with_spectrum(values)
    coefficients = torch.cat([torch.zeros(multiplicity), torch.ones(12)]).double()
    coefficients[0] = part
    rhs = vectors @ coefficients
    for radius in (10.0, 1e3):  # beyond the point where μ = 2 would end inside
        result = dense_trust_region(DenseOperator(matrix), rhs, radius)
        assert_optimal(matrix, rhs, radius, result, accuracy=1e-10)
        assert result.status is KrylovStatus.BOUNDARY
        assert result.multiplier == pytest.approx(2.0, abs=1e-6)
        exactly = dense_trust_region(DiagonalOperator(values.double()), coefficients, radius)
        assert_optimal(torch.diag(values.double()), coefficients, radius, exactly, accuracy=1e-14)


def test_nothing_but_negative_curvature_is_left_by_its_eigenvector(with_spectrum):
    matrix, vectors = with_spectrum([-2.0, 1.0, 3.0])
    result = dense_trust_region(DenseOperator(matrix), torch.zeros(3, dtype=F64), radius=2.0)
    assert result.status is KrylovStatus.BOUNDARY
    assert abs((result.solution @ vectors[:, 0]).item()) == pytest.approx(2.0)
    assert result.predicted_decrease == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_null_directions_are_left_alone(with_spectrum, normal, dtype):
    matrix, _ = with_spectrum(torch.cat([torch.zeros(10), torch.linspace(1.0, 2.0, 10)]))
    rhs = matrix @ normal(20)
    result = dense_trust_region(DenseOperator(matrix.to(dtype)), rhs.to(dtype), radius=100.0)
    assert (result.status, result.multiplier) == (KrylovStatus.CONVERGED, 0.0)
    expected = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ rhs
    torch.testing.assert_close(result.solution.double(), expected, rtol=0, atol=1e3 * torch.finfo(dtype).eps)
    assert result.solution.dtype is dtype


@pytest.mark.parametrize("preconditioned", [False, True])
def test_steihaug_gains_what_its_theory_says(with_spectrum, normal, preconditioned):
    """At least half of the optimum where A is definite (Yuan, 2000); at least the Cauchy point's decrease otherwise."""
    for least in (0.05, -2.0):
        matrix, _ = with_spectrum([least, *torch.linspace(0.1, 6.0, 30).tolist()])
        rhs = normal(31)
        for radius in (0.01, 0.5, 3.0):
            operator = Counted(matrix)
            result = steihaug_toint(
                operator,
                rhs,
                radius,
                preconditioner=DiagonalOperator(1 / (1 + matrix.diag().abs())) if preconditioned else None,
            )
            best = dense_trust_region(DenseOperator(matrix), rhs, radius)
            gained = result.predicted_decrease / best.predicted_decrease
            assert gained <= 1 + 1e-12
            if least > 0 and not preconditioned:
                assert gained >= 0.5
            steepest = rhs * min(radius / rhs.norm().item(), (rhs @ rhs / (rhs @ matrix @ rhs)).item())
            if not preconditioned and rhs @ matrix @ rhs > 0:
                assert result.predicted_decrease >= (rhs @ steepest - steepest @ matrix @ steepest / 2).item() - 1e-12
            assert result.solution.norm().item() <= radius * (1 + 1e-12)
            assert result.products == operator.products
            assert result.status in (KrylovStatus.CONVERGED, KrylovStatus.BOUNDARY, NEGATIVE)


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 10),
    seed=st.integers(0, 10_000),
    shift=st.floats(-3, 3),
    radius=st.floats(1e-3, 1e3),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    hard=st.booleans(),
)
def test_any_trust_region_problem_is_solved_globally(n, seed, shift, radius, scale, hard):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=F64)
    matrix = scale * ((root + root.T) / 2 + shift * torch.eye(n, dtype=F64))
    rhs = torch.randn(n, generator=generator, dtype=F64)
    if hard:
        lowest = torch.linalg.eigh(matrix)[1][:, 0]
        rhs -= (rhs @ lowest) * lowest
    result = dense_trust_region(DenseOperator(matrix), rhs, radius)
    assert_optimal(matrix, rhs, radius, result, accuracy=1e-9)
    assert result.predicted_decrease >= 0


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_sketched_step_is_the_best_of_its_subspace(damping):
    generator = torch.Generator().manual_seed(0)
    root, b, S = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((9, 9), (9,), (9, 4)))
    A = root @ root.mT
    result = sketched_newton(DenseOperator(A), b, S, damping=damping)
    full = A + damping * torch.eye(9, dtype=F64)
    torch.testing.assert_close(result.solution, S @ torch.linalg.solve(S.mT @ full @ S, S.mT @ b))
    torch.testing.assert_close(result.image, A @ result.solution)
    assert result.products == 4
    assert result.damped_decrease == pytest.approx(float(b @ result.solution) / 2)
    saddle = sketched_newton(DenseOperator(-A), b, S, indefinite=AbsoluteEigenvalues())
    torch.testing.assert_close(saddle.solution, sketched_newton(DenseOperator(A), b, S).solution)
