"""Solvers where the vectors live on an accelerator."""

import pytest
import torch

from imstep.linalg import DenseOperator, KrylovStatus, conjugate_gradient, smallest_eigenpair

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
