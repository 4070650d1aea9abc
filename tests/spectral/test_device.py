"""Spectra and inverses where the vectors live on an accelerator."""

import pytest
import torch
from spectral_cases import SPECTRA, planted

from imstep import spectral
from imstep.linalg import DenseOperator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_vectors_stay_on_the_device():
    values = SPECTRA["falling slowly"]
    A = DenseOperator(planted(values).float().cuda())
    found = spectral.eigenpairs(A, 3)
    assert found.vectors.is_cuda
    torch.testing.assert_close(found.values, values[:3], rtol=1e-5, atol=1e-5)
    assert spectral.trace(A, 0.05).value == pytest.approx(float(values.sum()), rel=0.15)
    assert spectral.diagonal(A, 0.1).value.is_cuda
    assert spectral.density(A, steps=20, probes=4).values.isfinite().all()
    assert spectral.log_determinant(A, 0.1, steps=20, probes=4).value == pytest.approx(
        float((values + 0.1).log().sum()), rel=0.2
    )
    b = torch.randn(200, 2, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    x = A.inverse(damping=0.1) @ b
    torch.testing.assert_close(A @ x + 0.1 * x, b, rtol=1e-3, atol=1e-3)
