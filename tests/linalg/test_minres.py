"""MINRES: certificates, SciPy, singular systems, curvature of the residuals."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg_cases import Counted, Failing

from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    ProductBudget,
    RelativeResidual,
    conjugate_gradient,
    minres,
)

F64 = torch.float64
NEGATIVE = KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
DEFINITE = torch.logspace(-2, 1, 50)
INDEFINITE = torch.cat([-torch.logspace(-1, 1, 20), torch.logspace(-1, 1, 30)])
ACCURATE = [RelativeResidual(1e-10)]


def preconditioner_for(n, dtype=F64):
    return DiagonalOperator(torch.linspace(0.2, 3.0, n, dtype=dtype))


@pytest.mark.parametrize("values", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
@pytest.mark.parametrize("damping", [0.0, 0.03])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_solution_and_every_reported_number(with_spectrum, normal, values, damping, preconditioned, warm):
    matrix, _ = with_spectrum(values)
    operator, rhs = Counted(matrix), normal(50)
    result = minres(
        operator,
        rhs,
        damping=damping,
        preconditioner=preconditioner_for(50) if preconditioned else None,
        stopping=ACCURATE,
        x0=normal(50, seed=5) if warm else None,
    )
    x, shifted = result.solution, matrix + damping * torch.eye(50, dtype=F64)
    assert result.status is KrylovStatus.CONVERGED
    residual = (rhs - shifted @ x).norm().item()
    assert result.residual_norm <= 1e-10 * rhs.norm()
    assert residual <= 1e-8 * rhs.norm()
    torch.testing.assert_close(x, torch.linalg.solve(shifted, rhs), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.image, matrix @ x, rtol=1e-7, atol=1e-7)
    assert result.curvature == pytest.approx((x @ matrix @ x).item(), rel=1e-7, abs=1e-6)
    undamped = (rhs @ x - x @ matrix @ x / 2).item()
    assert result.predicted_decrease == pytest.approx(undamped, rel=1e-7)
    assert result.damped_decrease == pytest.approx(undamped - damping * (x @ x).item() / 2, rel=1e-7)
    assert result.decreases[-1] == pytest.approx(result.damped_decrease, rel=1e-7)
    assert result.products == operator.products == result.iterations + warm
    assert len(result.decreases) == result.iterations + 1
    assert result.disturbing_direction is None


@pytest.mark.parametrize("values", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_every_truncated_iterate_minimises_the_residual(with_spectrum, normal, values, damping):
    """Against the dense least-squares problem over an orthonormal basis of the preconditioned Krylov space."""
    matrix, _ = with_spectrum(values)
    rhs, weights = normal(50), torch.linspace(0.2, 3.0, 50, dtype=F64)
    shifted = matrix + damping * torch.eye(50, dtype=F64)
    scaled = weights.sqrt()[:, None] * shifted * weights.sqrt()  # P^(1/2) (A + λI) P^(1/2)
    basis = (weights.sqrt() * rhs)[:, None]
    for k in range(1, 13):
        basis = torch.linalg.qr(basis)[0]
        y = torch.linalg.lstsq(scaled @ basis, weights.sqrt() * rhs).solution
        expected = weights.sqrt() * (basis @ y)
        result = minres(
            DenseOperator(matrix),
            rhs,
            damping=damping,
            preconditioner=DiagonalOperator(weights),
            stopping=[],
            max_iterations=k,
        )
        assert (result.status, result.iterations) == (KrylovStatus.MAX_ITERATIONS, k)
        torch.testing.assert_close(result.solution, expected, rtol=1e-7, atol=1e-9)
        assert result.residual_norm == pytest.approx((rhs - shifted @ expected).norm().item(), rel=1e-8)
        basis = torch.cat([basis, scaled @ basis[:, -1:]], dim=1)


def test_iterates_are_those_of_scipy(with_spectrum, normal):
    matrix, _ = with_spectrum(INDEFINITE)
    rhs, preconditioner = normal(50), preconditioner_for(50)
    for limit in (2, 7, 12):
        expected, _ = scipy.sparse.linalg.minres(
            matrix.numpy(), rhs.numpy(), shift=-0.2, rtol=0.0, maxiter=limit, M=preconditioner.to_scipy()
        )
        result = minres(
            DenseOperator(matrix), rhs, damping=0.2, preconditioner=preconditioner, stopping=(), max_iterations=limit
        )
        np.testing.assert_allclose(result.solution.numpy(), expected, rtol=1e-7, atol=1e-9)


def test_as_many_iterations_as_distinct_eigenvalues(with_spectrum, normal):
    matrix, _ = with_spectrum([-4.0] * 20 + [1.0] * 20 + [2.0] * 20)
    result = minres(DenseOperator(matrix), normal(60), stopping=ACCURATE)
    assert (result.status, result.iterations) == (KrylovStatus.CONVERGED, 3)


def test_a_preconditioner_changes_the_speed_only(with_spectrum, normal):
    sizes = torch.logspace(-1, 1, 50, dtype=F64)
    matrix = sizes[:, None] * with_spectrum(INDEFINITE)[0] * sizes
    plain, faster = (
        minres(DenseOperator(matrix), normal(50), stopping=ACCURATE, preconditioner=preconditioner)
        for preconditioner in (None, DiagonalOperator(sizes**-2))
    )
    for result in (plain, faster):
        assert result.status is KrylovStatus.CONVERGED
        torch.testing.assert_close(result.solution, torch.linalg.solve(matrix, normal(50)), rtol=1e-5, atol=1e-6)
    assert faster.iterations < plain.iterations / 2


def test_the_inverse_of_the_absolute_value_needs_two_iterations(with_spectrum, normal):
    matrix, vectors = with_spectrum(INDEFINITE)
    inverse = (vectors / INDEFINITE.double().abs()) @ vectors.T
    result = minres(DenseOperator(matrix), normal(50), preconditioner=DenseOperator(inverse))
    assert (result.status, result.iterations) == (KrylovStatus.CONVERGED, 2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_singular_system_that_has_a_solution_gets_the_shortest(with_spectrum, normal, sign, seed):
    matrix, _ = with_spectrum(torch.cat([torch.zeros(8), sign * torch.linspace(0.5, 4.0, 20), torch.ones(4)]), seed)
    rhs = matrix @ normal(32, seed)
    result = minres(DenseOperator(matrix), rhs, stopping=ACCURATE)
    assert result.status is KrylovStatus.CONVERGED
    expected = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ rhs
    torch.testing.assert_close(result.solution, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("indefinite", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_system_without_solution_gets_the_shortest_least_squares_solution(
    with_spectrum, normal, indefinite, preconditioned, seed
):
    values = torch.cat([torch.zeros(5), torch.linspace(1.0, 10.0, 30), (1 - 2 * indefinite) * torch.ones(5)])
    matrix, _ = with_spectrum(values, seed)
    rhs, weights = normal(40, seed + 50), torch.ones(40, dtype=F64)
    if preconditioned:
        weights = torch.linspace(0.5, 2.0, 40, dtype=F64)
    root = weights.sqrt()
    inverse = torch.linalg.pinv(root[:, None] * matrix * root, hermitian=True, rtol=1e-10)
    expected = root * (inverse @ (root * rhs))  # least ‖r‖_P, then least ‖x‖ in the norm of P⁻¹
    operator = Counted(matrix)
    preconditioner = DiagonalOperator(weights) if preconditioned else None
    result = minres(operator, rhs, stopping=(), preconditioner=preconditioner)
    assert result.status is KrylovStatus.LEAST_SQUARES
    assert result.products == operator.products <= result.iterations + 23
    torch.testing.assert_close(result.solution, expected, rtol=1e-4, atol=1e-5)
    true = rhs - matrix @ result.solution
    assert result.residual_norm == pytest.approx(true.norm().item(), rel=1e-10)
    assert (root * true).norm().item() == pytest.approx((root * (rhs - matrix @ expected)).norm().item(), rel=1e-9)
    torch.testing.assert_close(result.image, matrix @ result.solution, rtol=0, atol=1e-10)


@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_float32_reaches_the_least_residual(with_spectrum, normal, condition):
    matrix, _ = with_spectrum(torch.cat([torch.zeros(6), torch.logspace(0, -math.log10(condition), 60)]))
    rhs = normal(66)
    result = minres(DenseOperator(matrix.float()), rhs.float(), stopping=())
    least = rhs - matrix @ (torch.linalg.pinv(matrix, hermitian=True, rtol=1e-8) @ rhs)
    assert result.status is KrylovStatus.LEAST_SQUARES
    true = (rhs - matrix @ result.solution.double()).norm().item()
    assert true == pytest.approx(least.norm().item(), rel=1e-3)
    assert result.residual_norm == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_float32_converges_without_spurious_statuses(with_spectrum, normal, scale):
    matrix, _ = with_spectrum(torch.cat([-torch.logspace(0, -2, 50), torch.logspace(0, -2, 50)]))
    result = minres(DenseOperator(matrix.float() * scale), normal(100).float())
    assert result.status is KrylovStatus.CONVERGED
    residual = normal(100) - matrix @ (result.solution.double() * scale)
    assert residual.norm() < 1e-3 * normal(100).norm()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preconditioned", [False, True])
def test_until_a_direction_disturbs_every_iterate_gains(with_spectrum, normal, seed, preconditioned):
    matrix, _ = with_spectrum(torch.cat([-torch.ones(3), torch.logspace(-1, 1, 40)]), seed)
    rhs = normal(43, seed + 1)
    P = preconditioner_for(43) if preconditioned else None
    operator = Counted(matrix)
    result = minres(operator, rhs, preconditioner=P, stopping=ACCURATE, curvature_floor=0.0)
    assert result.status is NEGATIVE
    assert result.products == operator.products == result.iterations + 1
    assert list(result.decreases) == sorted(result.decreases)
    x, p = result.solution, result.disturbing_direction
    residual = rhs - matrix @ x
    along = residual if P is None else P @ residual
    torch.testing.assert_close(p * (along.norm() / p.norm()), along, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(result.disturbing_image, matrix @ p, rtol=1e-8, atol=1e-8)
    assert result.disturbing_curvature == pytest.approx((p @ matrix @ p).item(), rel=1e-6)
    assert result.disturbing_curvature <= 0
    inner = 0.0
    for k in range(1, result.iterations + 1):
        y = minres(DenseOperator(matrix), rhs, preconditioner=P, stopping=(), max_iterations=k).solution
        r = rhs - matrix @ y
        z = r if P is None else P @ r
        assert (rhs @ y).item() > inner
        inner = (rhs @ y).item()
        assert ((z @ matrix @ z).item() <= 0) is (k == result.iterations)


@pytest.mark.parametrize("seed", range(6))
def test_directions_disturb_after_as_many_products_as_in_cg(with_spectrum, normal, seed):
    """Both find the first k for which the Lanczos matrix T_k is not positive definite."""
    matrix, _ = with_spectrum(torch.cat([-torch.logspace(-2, 0, 3), torch.logspace(-2, 1, 40)]), seed)
    ours = minres(DenseOperator(matrix), normal(43, seed), stopping=(), curvature_floor=0.0)
    cg = conjugate_gradient(DenseOperator(matrix), normal(43, seed), stopping=())
    assert (ours.status, cg.status) == (NEGATIVE, NEGATIVE)
    assert ours.products == cg.products
    assert ours.solution.norm() < cg.solution.norm()


def test_without_a_floor_the_solve_goes_through(with_spectrum, normal):
    matrix, _ = with_spectrum([-2.0, -1.0, 0.5, 3.0])
    ended = minres(DenseOperator(matrix), normal(4), curvature_floor=0.0)
    through = minres(DenseOperator(matrix), normal(4))
    assert (ended.status, through.status) == (NEGATIVE, KrylovStatus.CONVERGED)
    assert through.products > ended.products


def test_the_floor_is_per_squared_norm_and_counts_damping():
    operator = DiagonalOperator(torch.tensor([0.01, 1.0]))
    for size in (1e-6, 1.0, 1e6):
        rhs = torch.tensor([size, 0.0])
        below, above, damped = (
            minres(operator, rhs, curvature_floor=floor, damping=damping).status
            for floor, damping in ((0.02, 0.0), (0.005, 0.0), (0.02, 0.02))
        )
        assert (below, above, damped) == (NEGATIVE, KrylovStatus.CONVERGED, KrylovStatus.CONVERGED)
    result = minres(DenseOperator(-3 * torch.eye(2)), torch.tensor([1.0, 0.0]), damping=1.0, curvature_floor=0.0)
    assert (result.status, result.disturbing_curvature) == (NEGATIVE, pytest.approx(-3.0))
    assert result.disturbing_image.tolist() == pytest.approx([-3.0, 0.0])
    assert minres(DenseOperator(torch.zeros(2, 2)), torch.ones(2), curvature_floor=0.0).status is NEGATIVE


def test_a_definite_matrix_gives_smaller_residuals_and_smaller_gains_than_cg(with_spectrum, normal):
    matrix, _ = with_spectrum(DEFINITE)
    for k in (3, 8, 15):
        ours, cg = (
            solve(DenseOperator(matrix), normal(50), stopping=[ProductBudget(k)])
            for solve in (minres, conjugate_gradient)
        )
        assert ours.products == cg.products == k
        assert ours.residual_norm < cg.residual_norm
        assert 0 < ours.damped_decrease < cg.damped_decrease


def test_trivial_systems():
    for rhs, x0, products in ((0.0, None, 0), (0.0, 1.0, 0), (4.0, 2.0, 1), (4.0, None, 1)):
        start = None if x0 is None else torch.full((1,), x0)
        result = minres(DenseOperator(2 * torch.eye(1)), torch.full((1,), rhs), x0=start)
        assert (result.status, result.products) == (KrylovStatus.CONVERGED, products)
        assert result.solution.equal(torch.full((1,), rhs / 2))
    nothing = minres(DenseOperator(torch.zeros(3, 3)), torch.ones(3))
    assert nothing.status is KrylovStatus.LEAST_SQUARES
    assert nothing.solution.equal(torch.zeros(3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_product_that_is_not_finite_keeps_the_last_finite_iterate(value, fails_at):
    diagonal = torch.linspace(-2.0, 5.0, 8)
    result = minres(Failing(diagonal, fails_at, value), torch.ones(8))
    expected = minres(DiagonalOperator(diagonal), torch.ones(8), max_iterations=fails_at - 1)
    assert (result.status, result.products) == (KrylovStatus.NON_FINITE, fails_at)
    assert result.solution.equal(expected.solution)
    assert result.image.isfinite().all()
    assert math.isfinite(result.predicted_decrease)


def test_other_sources_of_non_finite_numbers():
    operator, nan = DenseOperator(torch.eye(2)), torch.tensor([1.0, math.nan])
    for result in (
        minres(operator, nan),
        minres(operator, torch.ones(2), x0=nan),
        minres(operator, torch.ones(2), preconditioner=DiagonalOperator(nan)),
        minres(DenseOperator(3e38 * torch.ones(2, 2)), torch.ones(2)),
    ):
        assert result.status is KrylovStatus.NON_FINITE
        assert result.solution.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_may_leave_the_range_of_single_precision(scale):
    result = minres(DenseOperator(scale * torch.eye(2)), torch.full((2,), scale))
    assert result.status is KrylovStatus.CONVERGED
    assert result.solution.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1.0}, "damping"),
        ({"curvature_floor": -1e-3}, "curvature_floor"),
        ({"max_iterations": -1}, "max_iterations"),
        ({"x0": torch.ones(4)}, r"\(3,\)"),
        ({"preconditioner": DiagonalOperator(torch.ones(2))}, "agree in size"),
        ({"preconditioner": DiagonalOperator(-torch.ones(3))}, "not positive definite"),
    ],
)
def test_misuse_is_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        minres(DenseOperator(torch.eye(3)), torch.ones(3), **arguments)
    with pytest.raises(ValueError, match="minres solves for one vector"):
        minres(DenseOperator(torch.eye(3)), torch.ones(3, 2))


def test_an_indefinite_preconditioner_found_late_is_a_status():
    weights = torch.tensor([1.0, 1.0, -0.5])
    result = minres(
        DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 3.0]))),
        torch.ones(3),
        preconditioner=DiagonalOperator(weights),
        stopping=ACCURATE,
    )
    assert result.status is KrylovStatus.BREAKDOWN
    assert result.solution.isfinite().all()


def test_arguments_are_left_alone_and_shared_with_nothing():
    rhs, x0 = torch.ones(3), torch.full((3,), 0.1)
    for options in ({}, {"x0": x0}, {"x0": x0, "max_iterations": 0}):
        result = minres(DenseOperator(-torch.eye(3)), rhs, curvature_floor=0.0, **options)
        parts = [result.solution, result.image, result.disturbing_direction]
        for part in (part for part in parts if part is not None):
            part.fill_(7.0)
        assert rhs.equal(torch.ones(3))
        assert x0.equal(torch.full((3,), 0.1))


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(1, 10),
    seed=st.integers(0, 10_000),
    shift=st.floats(-3, 3),
    rank=st.integers(0, 10),
    floor=st.none() | st.just(0.0),
)
def test_any_symmetric_system_ends_in_a_certificate(n, seed, shift, rank, floor):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=F64)
    matrix = (root + root.T) / 2 + shift * torch.eye(n, dtype=F64)
    projector = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0][:, :rank]
    if rank < n:
        matrix = projector @ projector.T @ matrix @ projector @ projector.T
    rhs = torch.randn(n, generator=generator, dtype=F64)
    result = minres(DenseOperator(matrix), rhs, curvature_floor=floor)
    x = result.solution
    residual, size = rhs - matrix @ x, torch.linalg.matrix_norm(matrix, ord=2).item()
    assert result.residual_norm == pytest.approx(residual.norm().item(), rel=1e-5, abs=1e-6)
    assert result.residual_norm <= rhs.norm() * (1 + 1e-12)
    if result.status is KrylovStatus.CONVERGED:
        assert residual.norm() <= 1.1e-5 * rhs.norm() + 1e-10 * size * x.norm()
    elif result.status is KrylovStatus.LEAST_SQUARES:
        assert floor is None
        assert (matrix @ residual).norm() <= 1e-5 * size * rhs.norm()
    else:
        p = result.disturbing_direction
        assert result.status is NEGATIVE
        assert (p @ matrix @ p).item() <= 1e-7 * p.norm().item() * (matrix @ p).norm().item() + 1e-12 * size


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 12), seed=st.integers(0, 10_000), damping=st.floats(0, 10), scale=st.floats(1e-6, 1e6))
def test_definite_systems_are_solved_without_false_alarms(n, seed, damping, scale):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, 2 * n, generator=generator, dtype=F64)
    matrix = scale * (root @ root.T / n + 0.1 * torch.eye(n, dtype=F64))
    rhs = torch.randn(n, generator=generator, dtype=F64)
    result = minres(
        DenseOperator(matrix),
        rhs,
        damping=damping * scale,
        stopping=[RelativeResidual(1e-8)],
        curvature_floor=0.0,
    )
    assert result.status is KrylovStatus.CONVERGED
    assert (rhs - matrix @ result.solution - damping * scale * result.solution).norm() <= 1e-7 * rhs.norm()
    assert result.predicted_decrease >= result.damped_decrease > 0
