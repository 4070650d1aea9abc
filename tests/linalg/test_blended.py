"""CG on a blend of a matrix and of the preconditioner's inverse, against dense algebra."""

import pytest
import torch

from imstep.linalg import (
    DenseOperator,
    DiagonalOperator,
    KrylovStatus,
    ProductBudget,
    RelativeResidual,
    blended_conjugate_gradient,
    conjugate_gradient,
)

F64 = torch.float64


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
def test_solution_and_every_reported_number(with_spectrum, normal, weight):
    matrix, _ = with_spectrum(torch.logspace(-3, 1, 40))
    rhs, prior, damping = normal(40), matrix.diag() + 0.1, 1e-2
    result = blended_conjugate_gradient(
        DenseOperator(matrix),
        rhs,
        DiagonalOperator(1 / prior),
        weight=weight,
        damping=damping,
        stopping=[RelativeResidual(1e-12)],
        keep_pairs=3,
    )
    blend = (1 - weight) * (matrix + damping * torch.eye(40, dtype=F64)) + weight * prior.diag()
    x = result.solution
    assert result.status is KrylovStatus.CONVERGED
    torch.testing.assert_close(x, torch.linalg.solve(blend, rhs), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.image, matrix @ x, rtol=1e-9, atol=1e-9)
    undamped = float(rhs @ x - x @ matrix @ x / 2)
    assert result.predicted_decrease == pytest.approx(undamped, rel=1e-9)
    assert result.damped_decrease == pytest.approx(undamped - damping * float(x @ x) / 2, rel=1e-9)
    assert result.decreases[-1] == pytest.approx(float(rhs @ x - x @ blend @ x / 2), rel=1e-9)
    assert result.products == result.iterations
    assert len(result.pairs) == 3
    for p, image in result.pairs:
        torch.testing.assert_close(image, matrix @ p)


def test_without_a_share_of_the_prior_it_is_preconditioned_cg(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.logspace(-2, 1, 20))
    rhs, preconditioner, rules = normal(20), DiagonalOperator(1 / matrix.diag()), [ProductBudget(7)]
    plain = conjugate_gradient(DenseOperator(matrix), rhs, preconditioner=preconditioner, stopping=rules)
    blended = blended_conjugate_gradient(DenseOperator(matrix), rhs, preconditioner, weight=0.0, stopping=rules)
    torch.testing.assert_close(blended.solution, plain.solution, rtol=1e-10, atol=1e-10)
    assert blended.decreases == pytest.approx(plain.decreases)


def test_endings(normal):
    indefinite = DenseOperator(torch.tensor([[1.0, 0.0], [0.0, -9.0]], dtype=F64))
    one, rhs = DiagonalOperator(torch.ones(2, dtype=F64)), torch.tensor([0.0, 2.0], dtype=F64)
    result = blended_conjugate_gradient(indefinite, rhs, one, weight=0.5)
    assert result.status is KrylovStatus.DISTURBING_NEGATIVE_CURVATURE
    assert result.disturbing_curvature == -36
    assert not result.solution.any()
    # The prior outweighs the negative curvature: -0.1 * 9 + 0.9 = 0 needs a little more than 0.9.
    assert blended_conjugate_gradient(indefinite, rhs, one, weight=0.95).status is KrylovStatus.CONVERGED
    infinite = DenseOperator(torch.full((2, 2), torch.inf, dtype=F64))
    assert blended_conjugate_gradient(infinite, rhs, one, weight=0.5).status is KrylovStatus.NON_FINITE
    assert blended_conjugate_gradient(indefinite, 0 * rhs, one, weight=0.5).status is KrylovStatus.CONVERGED
    with pytest.raises(ValueError, match="weight"):
        blended_conjugate_gradient(indefinite, rhs, one, weight=1.0)
    with pytest.raises(ValueError, match="not positive definite"):
        blended_conjugate_gradient(indefinite, rhs, DiagonalOperator(-torch.ones(2, dtype=F64)), weight=0.5)
