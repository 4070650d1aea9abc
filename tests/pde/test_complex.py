"""Fields with complex intermediates, by one forward pass against nested reverse mode, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from imstep import pde
from tests.pde.nested import agrees, points

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
TURN = torch.randn(4, 3, dtype=torch.complex128)


def wave(x: Tensor) -> Tensor:
    """Two complex numbers for each point, no part near 0."""
    return torch.complex(NET(x)[:, :2] + 2, NET(x)[:, 2:] - 2)


def matrix(x: Tensor) -> Tensor:
    return torch.einsum("ni,nj->nij", x, x) / 10 + torch.tensor([[1.0, 2.0, 0.0], [-3.0, 0.5, 1.0], [0.0, -1.0, 2.0]])


FIELDS = {
    "beside a real path": lambda x: NET(x)[:, :2] + wave(x).abs(),
    "pairs": lambda x: torch.view_as_complex(NET(x).reshape(-1, 2, 2)).abs(),
    "as pairs": lambda x: torch.view_as_real(wave(x) ** 2),
    "polar": lambda x: torch.polar(NET(x)[:, 0].exp(), NET(x)[:, 1]).real,
    "angle": lambda x: wave(x).angle(),
    "fft": lambda x: torch.fft.fft(NET(x)).abs(),
    "rfft and back": lambda x: torch.fft.irfft(torch.fft.rfft(NET(x)) ** 2, n=4),
    "conjugate": lambda x: (wave(x).conj() * wave(x) ** 2).imag,
    "part of a conjugate": lambda x: wave(x).conj().imag * x[:, :1],
    "adjoint": lambda x: (wave(x)[:, :, None] * wave(x)[:, None, :]).mH.imag,
    "product with a conjugate": lambda x: torch.einsum("ni,ni->n", wave(x), wave(x).conj() ** 2).abs(),
    "phase": lambda x: torch.exp(1j * NET(x)).real,
    "a complex constant": lambda x: (NET(x) + 1j).abs(),
    "functions": lambda x: torch.stack([wave(x).log(), wave(x).sqrt(), wave(x).tanh(), 1 / wave(x)], 1).imag,
    "powers": lambda x: (wave(x) ** 3 + wave(x) ** 2.5 + wave(x) ** NET(x)[:, :2]).imag,
    "powers of a number": lambda x: (2j ** NET(x)).imag + torch.pow(torch.tensor(1 + 2j), NET(x)).imag,
    "put together": lambda x: torch.cat([wave(x), NET(x)], 1).abs(),
    "chosen": lambda x: torch.where(x[:, :2] > 0, wave(x), 1j).abs(),
    "layer": lambda x: (NET(x).to(torch.complex128) @ TURN).abs(),
    "eigenvalues": lambda x: torch.linalg.eigvals(matrix(x)).imag.abs().sum(1),
    "a complex result": lambda x: wave(x) ** 2,
}


@pytest.mark.parametrize("name", FIELDS)
def test_complex_intermediates_carry_derivatives(name: str) -> None:
    agrees(FIELDS[name])


def test_parameters_are_reached_through_complex_intermediates() -> None:
    x = points().requires_grad_()
    field = lambda x: wave(x).abs().sum(1)
    (got,) = torch.autograd.grad(pde.gradient(field, x).square().sum(), NET[0].weight)
    (slope,) = torch.autograd.grad(field(x).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(slope.square().sum(), NET[0].weight)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
