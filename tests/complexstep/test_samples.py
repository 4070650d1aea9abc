"""Samples that follow the parameters of their distribution: against PyTorch's gradients and double backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, distributions

import imstep

W = torch.tensor([0.8, 1.3, 2.0, 0.6], dtype=torch.float64)
V = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
TWO = torch.full((4,), 2.0, dtype=torch.float64)

CONCENTRATIONS = {
    "gamma": lambda w: distributions.Gamma(w, TWO),
    "chi squared": distributions.Chi2,
    "beta": lambda w: distributions.Beta(w, 2 * w),
    "dirichlet": distributions.Dirichlet,
    "dirichlets": lambda w: distributions.Dirichlet(torch.stack([w, w * w])),
    "student": lambda w: distributions.StudentT(2 * w, w, w),
    "inverse gamma": lambda w: distributions.InverseGamma(w, TWO),
    "wishart": lambda w: distributions.Wishart(w[0] + 4, torch.diag(w)),
}
SCALES = {
    "gamma": lambda w: distributions.Gamma(TWO, w),
    "student": lambda w: distributions.StudentT(TWO, w, w),
    "gamma after another": lambda w: distributions.Gamma(distributions.Gamma(TWO, TWO).sample(), w),
    "wishart": lambda w: distributions.Wishart(TWO[0] * 3, torch.diag(w)),
}


def _loss(distribution):
    def loss(w: Tensor) -> Tensor:
        torch.manual_seed(0)
        return distribution(w).rsample().sin().sum()

    return loss


@pytest.mark.parametrize("name", CONCENTRATIONS)
def test_concentrations(name):
    """The first derivative is PyTorch's; the second is known to nobody."""
    f = _loss(CONCENTRATIONS[name])
    slope = torch.autograd.functional.jacobian(f, W) @ V
    torch.testing.assert_close(imstep.jvp(f, (W,), (V,))[1], slope, rtol=1e-12, atol=1e-13)
    p = W.clone().requires_grad_()
    for call in (
        lambda: imstep.hvp(f, W, V),
        lambda: imstep.Hessian(lambda: f(p), [p]),
        lambda: imstep.jvp(lambda w: imstep.jvp(f, (w,), (V,))[1], (W,), (V,)),
        lambda: imstep.NewtonKrylov([p]).step(lambda: f(p)),
    ):
        with pytest.raises(imstep.UnsupportedOperatorError, match=r"second derivatives of a sample.*by detach"):
            call()


def test_least_squares_fit_concentrations():
    p = W.clone().requires_grad_()
    optimizer = imstep.LeastSquares([p])
    losses = [
        optimizer.step(lambda: (distributions.Gamma(p.exp(), TWO).rsample() - 1).square().sum()).item()
        for _ in range(8)
    ]
    assert losses[-1] < losses[0] or min(losses) < 1e-12


@pytest.mark.parametrize("name", SCALES)
def test_scales(name):
    """What Gamma clamps out of autograd's sight is within its bounds."""
    f = _loss(SCALES[name])
    expected = torch.autograd.functional.hvp(f, W, V)[1]
    torch.testing.assert_close(imstep.hvp(f, W, V), expected, rtol=1e-12, atol=1e-13)
    p = W.clone().requires_grad_()
    H = imstep.Hessian(lambda: f(p), [p])
    assert H.nbytes > 0
    torch.testing.assert_close(H @ V, expected, rtol=1e-12, atol=1e-13)


def test_a_detached_view_that_is_clamped_is_refused():
    def f(w: Tensor) -> Tensor:
        y = w * w
        y.detach().clamp_(min=1.0)
        return y.sum()

    with pytest.raises(imstep.UnsupportedOperatorError, match=r"clamp_.*made by \.detach"):
        imstep.hvp(f, W, V)


def test_counts():
    f = lambda w: torch.binomial(TWO, w / 3).sum() * w.sum()
    with pytest.raises(imstep.UnsupportedOperatorError, match=r"binomial.*p\.detach"):
        imstep.jvp(f, (W,), (V,))
    torch.manual_seed(0)
    count = torch.binomial(TWO, W / 3).sum()
    torch.manual_seed(0)
    found = imstep.jvp(lambda w: torch.binomial(TWO, w.detach() / 3).sum() * w.sum(), (W,), (V,))[1]
    torch.testing.assert_close(found, count * V.sum())
