"""GLTR: optimality conditions in easy, hard and interior cases, the Krylov space, restarts, preconditioning."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg_cases import Counted, Failing, assert_optimal

from imstep.linalg import (
    BestRate,
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    ProductBudget,
    RelativeResidual,
    conjugate_gradient,
    dense_trust_region,
    gltr,
)

F64 = torch.float64
ACCURATE = [RelativeResidual(1e-9)]
DEFINITE = torch.logspace(-2, 1, 60)
INDEFINITE = torch.cat([-torch.linspace(0.3, 2.0, 4), torch.logspace(-2, 1, 56)])


@pytest.mark.parametrize("values", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
@pytest.mark.parametrize("radius", [0.1, 3.0, 1e3])
@pytest.mark.parametrize("damping", [0.0, 0.2])
@pytest.mark.parametrize("limit", [6, 64])
def test_the_solution_is_global_and_every_number_its_own(with_spectrum, normal, values, radius, damping, limit):
    matrix, _ = with_spectrum(values)
    operator, rhs = Counted(matrix), normal(60)
    result = gltr(operator, rhs, radius, damping=damping, stopping=ACCURATE, basis_limit=limit)
    assert_optimal(matrix, rhs, radius, result, damping=damping, accuracy=1e-8)
    inside = result.multiplier == 0
    assert result.status is (KrylovStatus.CONVERGED if inside else KrylovStatus.BOUNDARY)
    x = result.solution
    assert x.norm().item() == pytest.approx(radius, rel=1e-10) or inside
    torch.testing.assert_close(result.image, matrix @ x, rtol=1e-9, atol=1e-9 * radius)
    assert result.curvature == pytest.approx((x @ matrix @ x).item(), rel=1e-8)
    undamped = (rhs @ x - x @ matrix @ x / 2).item()
    assert result.predicted_decrease == pytest.approx(undamped, rel=1e-9)
    assert result.damped_decrease == pytest.approx(undamped - damping * (x @ x).item() / 2, rel=1e-9)
    shift = damping + result.multiplier
    assert result.residual_norm == pytest.approx((rhs - matrix @ x - shift * x).norm().item(), rel=1e-3, abs=1e-11)
    assert all(b >= a * (1 - 1e-13) for a, b in pairwise(result.decreases))
    assert result.products == operator.products == result.iterations == len(result.decreases) - 1
    exact = dense_trust_region(DenseOperator(matrix), rhs, radius, damping=damping)
    assert result.damped_decrease == pytest.approx(exact.damped_decrease, rel=1e-10)
    assert result.multiplier == pytest.approx(exact.multiplier, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("radius", [0.5, 20.0])
def test_every_iterate_is_the_best_of_its_krylov_space(with_spectrum, normal, radius):
    matrix, _ = with_spectrum(INDEFINITE)
    rhs = normal(60)
    basis = rhs[:, None]
    for k in range(1, 10):
        basis = torch.linalg.qr(basis)[0]
        projected = basis.T @ matrix @ basis
        best = dense_trust_region(DenseOperator((projected + projected.T) / 2), basis.T @ rhs, radius)
        result = gltr(DenseOperator(matrix), rhs, radius, stopping=[ProductBudget(k)])
        assert (result.status, result.products) == (KrylovStatus.MAX_ITERATIONS, k)
        torch.testing.assert_close(result.solution, basis @ best.solution, rtol=1e-6, atol=1e-8)
        assert result.multiplier == pytest.approx(best.multiplier, rel=1e-8)
        basis = torch.cat([basis, matrix @ basis[:, -1:]], dim=1)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_inside_the_ball_the_iterates_are_those_of_cg(with_spectrum, normal, preconditioned):
    matrix, _ = with_spectrum(DEFINITE)
    operator, rhs = DenseOperator(matrix), normal(60)
    P = DiagonalOperator(torch.linspace(0.2, 3.0, 60, dtype=F64)) if preconditioned else None
    for k in (1, 4, 15):
        ours = gltr(operator, rhs, 1e6, stopping=(), max_iterations=k, preconditioner=P)
        cg = conjugate_gradient(operator, rhs, stopping=(), max_iterations=k, preconditioner=P)
        assert ours.multiplier == 0
        torch.testing.assert_close(ours.solution, cg.solution, rtol=1e-6, atol=1e-8 * cg.solution.norm().item())
    expected = torch.linalg.solve(matrix, rhs)
    for limit, price in ((60, 1.0), (32, 1.6), (6, 4.0)):  # restarts cost products
        ours = gltr(operator, rhs, 1e6, stopping=ACCURATE, basis_limit=limit, preconditioner=P)
        cg = conjugate_gradient(operator, rhs, stopping=ACCURATE, preconditioner=P)
        assert ours.products <= price * cg.products
        torch.testing.assert_close(ours.solution, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("radius", "gain"), [(1.0, 1.0), (30.0, 2.0), (1e3, 3.0)])
def test_a_preconditioner_changes_the_speed_only(with_spectrum, normal, radius, gain):
    sizes = torch.logspace(-1.5, 1.5, 60, dtype=F64)
    matrix = sizes[:, None] * with_spectrum(INDEFINITE + 2.5)[0] * sizes
    plain, faster = (
        gltr(DenseOperator(matrix), normal(60), radius, stopping=ACCURATE, preconditioner=preconditioner)
        for preconditioner in (None, DiagonalOperator(1 / (sizes**2 + 1 / radius)))
    )
    for result in (plain, faster):
        assert_optimal(matrix, normal(60), radius, result, accuracy=1e-7)
    assert faster.predicted_decrease == pytest.approx(plain.predicted_decrease, rel=1e-4)
    assert faster.products < plain.products / gain


@pytest.mark.parametrize("radius", [3.0, 1e3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [8, 32])
def test_the_hard_case_needs_a_random_vector(normal, radius, seed, limit):
    matrix = torch.diag(torch.cat([torch.tensor([-2.0]), torch.linspace(-0.5, 5.0, 40)]).double())
    rhs = normal(41, seed) / 10
    rhs[0] = 0.0  # no part along the least eigenvalue
    blind = gltr(DenseOperator(matrix), rhs, radius, stopping=[RelativeResidual(1e-6)], basis_limit=limit)
    assert blind.multiplier < 1.9
    operator = Counted(matrix)
    result = gltr(
        operator,
        rhs,
        radius,
        stopping=[RelativeResidual(1e-8)],
        basis_limit=limit,
        generator=torch.Generator().manual_seed(seed),
    )
    assert_optimal(matrix, rhs, radius, result, accuracy=1e-6)
    assert result.status is KrylovStatus.BOUNDARY
    assert result.products == operator.products
    assert result.multiplier == pytest.approx(2.0, abs=1e-4)
    assert result.predicted_decrease > blind.predicted_decrease
    exact = dense_trust_region(DenseOperator(matrix), rhs, radius)
    assert result.predicted_decrease == pytest.approx(exact.predicted_decrease, rel=1e-6)


def test_the_random_vector_changes_nothing_where_there_is_nothing_to_find(with_spectrum, normal):
    matrix, _ = with_spectrum(DEFINITE)
    for radius in (1.0, 1e3):
        sure, unsure = (
            gltr(DenseOperator(matrix), normal(60), radius, stopping=ACCURATE, generator=generator, probes=5)
            for generator in (torch.Generator().manual_seed(0), None)
        )
        torch.testing.assert_close(sure.solution, unsure.solution, rtol=1e-6, atol=1e-7)
        assert sure.status is unsure.status
        assert unsure.products < sure.products <= unsure.products + 5


def test_negative_curvature_is_found_without_a_right_hand_side(with_spectrum):
    matrix, vectors = with_spectrum([-2.0, *torch.linspace(0.5, 3.0, 30).tolist()])
    zero = torch.zeros(31, dtype=F64)
    nowhere = gltr(DenseOperator(matrix), zero, 3.0)
    assert (nowhere.status, nowhere.products) == (KrylovStatus.CONVERGED, 0)
    result = gltr(DenseOperator(matrix), zero, 3.0, generator=torch.Generator().manual_seed(0))
    assert result.status is KrylovStatus.BOUNDARY
    assert abs((result.solution @ vectors[:, 0]).item()) == pytest.approx(3.0, rel=1e-4)
    assert result.predicted_decrease == pytest.approx(9.0, rel=1e-6)


@pytest.mark.parametrize("values", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
def test_float32_reaches_the_decrease(with_spectrum, normal, values):
    matrix, _ = with_spectrum(values)
    for radius in (1.0, 100.0):
        result = gltr(DenseOperator(matrix.float()), normal(60).float(), radius, basis_limit=10)
        exact = dense_trust_region(DenseOperator(matrix), normal(60), radius)
        assert result.solution.dtype is torch.float32
        assert result.status in (KrylovStatus.CONVERGED, KrylovStatus.BOUNDARY)
        assert result.predicted_decrease == pytest.approx(exact.predicted_decrease, rel=1e-5)
    endless = gltr(DenseOperator(matrix.float()), normal(60).float(), 1.0, stopping=())
    assert endless.status is KrylovStatus.BOUNDARY  # rounding level


def test_stopping_rules_end_it(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-4, 0, 100))
    result = gltr(DenseOperator(matrix), normal(100), 1e4, stopping=[BestRate()])
    assert result.status is KrylovStatus.ENOUGH
    assert result.multiplier == 0
    nothing = gltr(DenseOperator(matrix), normal(100), 1.0, max_iterations=0)
    assert (nothing.status, nothing.products) == (KrylovStatus.MAX_ITERATIONS, 0)
    assert nothing.solution.equal(torch.zeros(100, dtype=F64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_product_that_is_not_finite_keeps_the_last_finite_iterate(value, fails_at):
    diagonal = torch.linspace(-2.0, 5.0, 8)
    result = gltr(Failing(diagonal, fails_at, value), torch.ones(8), 2.0)
    expected = gltr(DiagonalOperator(diagonal), torch.ones(8), 2.0, max_iterations=fails_at - 1)
    assert (result.status, result.products) == (KrylovStatus.NON_FINITE, fails_at)
    torch.testing.assert_close(result.solution, expected.solution)
    assert result.image.isfinite().all()
    assert math.isfinite(result.predicted_decrease)
    late = gltr(Failing(diagonal.abs(), 9, value), torch.zeros(8), 2.0, generator=torch.Generator().manual_seed(0))
    assert late.solution.equal(torch.zeros(8))


def test_other_sources_of_non_finite_numbers():
    nan = torch.tensor([1.0, math.nan])
    for result in (
        gltr(DenseOperator(torch.eye(2)), nan, 1.0),
        gltr(DenseOperator(torch.eye(2)), torch.ones(2), 1.0, preconditioner=DiagonalOperator(nan)),
    ):
        assert result.status is KrylovStatus.NON_FINITE
        assert result.solution.equal(torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1.0}, "damping"),
        ({"radius": 0.0}, "radius must be positive"),
        ({"radius": math.inf}, "conjugate_gradient"),
        ({"max_iterations": -1}, "max_iterations"),
        ({"basis_limit": 5}, "basis_limit"),
        ({"probes": 0}, "probes"),
        ({"preconditioner": DiagonalOperator(torch.ones(2))}, "agree"),
        ({"preconditioner": DiagonalOperator(-torch.ones(3))}, "not positive definite"),
    ],
)
def test_misuse_is_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        gltr(DenseOperator(torch.eye(3)), torch.ones(3), **{"radius": 1.0, **arguments})
    with pytest.raises(ValueError, match="gltr solves for one vector"):
        gltr(DenseOperator(torch.eye(3)), torch.ones(3, 2), 1.0)


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(1, 14),
    seed=st.integers(0, 10_000),
    shift=st.floats(-3, 3),
    radius=st.floats(1e-3, 1e3),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    hard=st.booleans(),
    limit=st.sampled_from([6, 32]),
)
def test_any_trust_region_problem_is_solved_globally(n, seed, shift, radius, scale, hard, limit):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=F64)
    matrix = scale * ((root + root.T) / 2 + shift * torch.eye(n, dtype=F64))
    rhs = torch.randn(n, generator=generator, dtype=F64)
    if hard:
        lowest = torch.linalg.eigh(matrix)[1][:, 0]
        rhs -= (rhs @ lowest) * lowest
    result = gltr(
        DenseOperator(matrix),
        rhs,
        radius,
        stopping=[RelativeResidual(1e-9)],
        basis_limit=limit,
        generator=generator,
    )
    assert_optimal(matrix, rhs, radius, result, accuracy=1e-6)
    exact = dense_trust_region(DenseOperator(matrix), rhs, radius)
    assert result.predicted_decrease == pytest.approx(exact.predicted_decrease, rel=1e-5, abs=1e-12)
