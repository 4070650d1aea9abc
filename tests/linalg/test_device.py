"""Solvers where the vectors live on an accelerator."""

import pytest
import torch

from imstep.linalg import (
    DenseOperator,
    KrylovStatus,
    adaptive_nystrom,
    conjugate_gradient,
    dense_solve,
    dense_trust_region,
    diagonal_preconditioner,
    gltr,
    hutchinson_diagonal,
    minres,
    nystrom,
    smallest_eigenpair,
    steihaug_toint,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_vectors_stay_on_the_device(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.linspace(0.5, 4.0, 50))
    operator = DenseOperator(matrix.float().cuda())
    result = conjugate_gradient(operator, normal(50).float().cuda())
    assert result.status is KrylovStatus.CONVERGED
    assert result.solution.is_cuda
    torch.testing.assert_close(
        result.solution.cpu().double(), torch.linalg.solve(matrix, normal(50)), rtol=1e-3, atol=1e-3
    )
    pair = smallest_eigenpair(operator, generator=torch.Generator().manual_seed(0))
    assert pair.vector.is_cuda
    assert pair.value == pytest.approx(0.5, abs=1e-3)


def test_every_solver_and_preconditioner_stays_on_the_device(with_spectrum, normal):
    matrix, _ = with_spectrum(torch.cat([torch.tensor([-0.5]), torch.linspace(0.5, 4.0, 49)]))
    indefinite, rhs = DenseOperator(matrix.float().cuda()), normal(50).float().cuda()
    generator = torch.Generator().manual_seed(0)
    for result in (
        minres(indefinite, rhs),
        steihaug_toint(indefinite, rhs, 2.0),
        gltr(indefinite, rhs, 2.0, basis_limit=8, generator=generator),
        dense_solve(indefinite, rhs),
        dense_trust_region(indefinite, rhs, 2.0),
    ):
        assert result.solution.is_cuda
        assert result.image.is_cuda
        torch.testing.assert_close(result.image, indefinite @ result.solution, rtol=1e-3, atol=1e-3)
    definite = DenseOperator((matrix @ matrix).float().cuda())
    diagonal = hutchinson_diagonal(definite, 4, generator=generator)
    for preconditioner in (
        nystrom(definite, 10, generator=generator).preconditioner(0.1),
        adaptive_nystrom(definite, 0.1, generator=generator).preconditioner(0.1),
        diagonal_preconditioner(diagonal.mean, damping=0.1),
    ):
        result = conjugate_gradient(definite, rhs, damping=0.1, preconditioner=preconditioner)
        assert result.status is KrylovStatus.CONVERGED
        assert result.solution.is_cuda
