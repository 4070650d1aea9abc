"""Models whose intermediate tensors are complex: each carries a complex imaginary part of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import imstep
from imstep.complexstep import Arithmetic
from imstep.curvature.hessian import Hessian

N = 18  # nine complex numbers


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(3, 3, 2)) + torch.eye(3, dtype=torch.complex128)


def modulus(z: Tensor) -> Tensor:
    return (z * z.conj()).real.sum()


def hermitian(x: Tensor) -> Tensor:
    z = as_complex(x)
    return z @ z.mH + torch.eye(3)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "polar": lambda x: modulus(torch.polar(x[:9].exp(), x[9:]) + x[:9]),
    "parts": lambda x: (as_complex(x).abs() * as_complex(x).angle()).sum() + as_complex(x).imag.prod(),
    "sign": lambda x: torch.view_as_real(torch.sgn(as_complex(x)) * as_complex(x).conj()).pow(3).sum(),
    "functions": lambda x: modulus(
        torch.tanh(as_complex(x)) * torch.exp(as_complex(x)) / (2 + torch.sin(as_complex(x)))
    ),
    "fourier": lambda x: modulus(torch.fft.fft2(as_complex(x)) * torch.fft.rfft(x.reshape(3, 6))[:, :3]),
    "round_trip": lambda x: torch.fft.irfft(torch.fft.rfft(x).pow(2), n=N).pow(3).sum(),
    "spectrogram": lambda x: torch.stft(x, 6, 2, window=torch.hann_window(6).double(), return_complex=True).abs().sum(),
    "solve": lambda x: modulus(torch.linalg.solve(as_complex(x), as_complex(x.flip(0)))),
    "pinv": lambda x: modulus(torch.linalg.pinv(as_complex(x)[:, :2])),
    "cholesky": lambda x: modulus(torch.linalg.cholesky(hermitian(x)).tanh()),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(hermitian(x)).log().pow(2).sum(),
    "eigvals": lambda x: torch.linalg.eigvals(x[:9].reshape(3, 3)).abs().log().pow(2).sum(),
    "svdvals": lambda x: torch.linalg.svdvals(as_complex(x)).pow(3).sum(),
    "qr": lambda x: modulus(torch.linalg.qr(as_complex(x)).R.tanh()),
    "writes": lambda x: modulus(as_complex(x).clone().index_fill_(0, torch.tensor([1]), 0.5j).mul_(as_complex(x))),
}


def point() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


ZEROS = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1]])
HELD = {
    "cumprod": lambda x: modulus(torch.cumprod(as_complex(x) * ZEROS, 1)),
    "prod": lambda x: modulus((as_complex(x) * ZEROS).prod(1) + as_complex(x).sum(0)),
    "nothing": lambda x: modulus(as_complex(x)[3:].exp()) + modulus(torch.combinations(x[:1] + 1j)) + x @ x**2,
}


@pytest.mark.parametrize("name", HELD)
def test_zeros_and_empty_tensors(name: str) -> None:
    """Against central differences of the gradient: at zeros PyTorch's gradient of a product is a formula of its own."""
    f = HELD[name]
    x, v = point()
    expected = (gradient(f, x + 1e-5 * v) - gradient(f, x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(imstep.hvp(f, x, v), expected, rtol=1e-6, atol=1e-6)
    w = x.clone().requires_grad_()
    block = Hessian(lambda: f(w), [w]) @ torch.stack([v, 2 * v], 1)
    torch.testing.assert_close(block, torch.stack([expected, 2 * expected], 1), rtol=1e-6, atol=1e-6)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    w = x.clone().requires_grad_()
    return torch.autograd.grad(f(w), w)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_against_double_backward(name: str) -> None:
    f = LOSSES[name]
    x, v = point()
    w = x.clone().requires_grad_()
    gradient = torch.autograd.grad(f(w), w, create_graph=True)[0]
    expected = torch.autograd.grad(gradient @ v, w)[0]
    tolerance = {"rtol": 1e-11, "atol": 1e-11 * float(expected.abs().max())}
    torch.testing.assert_close(imstep.hvp(f, x, v), expected, **tolerance)
    hessian = Hessian(lambda: f(w), [w])
    torch.testing.assert_close(hessian @ v, expected, **tolerance)
    torch.testing.assert_close(
        hessian @ torch.stack([v, 2 * v], 1), torch.stack([expected, 2 * expected], 1), **tolerance
    )


PLACES = {
    **LOSSES,
    "slices": lambda x: modulus(as_complex(x)[1:, ::2].tanh()) + torch.view_as_complex(x.view(9, 2)[2:]).abs().prod(),
    "part of a conjugate": lambda x: (torch.view_as_complex(x.view(9, 2)).conj().imag.sin() * x[:9]).sum(),
    "writes at pairs": lambda x: modulus(pairs_overwritten(x)),
    "writes at an imaginary part": lambda x: modulus(imaginary_part_overwritten(x)),
}


def pairs_overwritten(x: Tensor) -> Tensor:
    y = x[:7] * x[1:8]  # its last entry belongs to no pair
    z = torch.view_as_complex(y[:6].view(3, 2))
    z[1:].mul_(z[0] * 1j)
    return z * y[6]


def imaginary_part_overwritten(x: Tensor) -> Tensor:
    z = (torch.view_as_complex(x.view(9, 2)) ** 2).conj()
    z.imag.copy_(x[:9].exp())
    return z**2


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("name", PLACES)
def test_complex_view_of_a_parameter_at_any_place(name: str, before: int) -> None:
    """Complex numbers begin at even places of memory; a part of a direction, and the next direction, may not."""
    x, _ = point()
    a, w, b = x[:before].clone().requires_grad_(), x.clone().requires_grad_(), x[-1:].clone().requires_grad_()
    f = lambda: PLACES[name](w) * a.sum() * b.sum() ** 2
    gradients = torch.autograd.grad(f(), [a, w, b], create_graph=True)
    rows = torch.eye(N, N + before + 1, dtype=torch.float64)
    product = lambda parts: torch.autograd.grad(gradients, [a, w, b], [u.clone() for u in parts], retain_graph=True)
    expected = torch.stack([torch.cat(product(u.split([before, N, 1]))) for u in rows])
    tolerance = {"rtol": 1e-10, "atol": 1e-10 * float(expected.abs().max())}
    hessian = Hessian(f, [a, w, b])
    torch.testing.assert_close(hessian @ rows.T, expected.T, **tolerance)
    torch.testing.assert_close(torch.stack([hessian @ u for u in rows]), expected, **tolerance)
    at = slice(before, before + N)
    torch.testing.assert_close(hessian.block([w]).to_dense()[:, :-before], expected[before:, at].T, **tolerance)


def test_lazy_conjugation_inside_kernels_is_carried_out() -> None:
    """Below a dispatch mode PyTorch leaves it out, so that pinv of a complex matrix is wrong under any mode."""
    z = torch.randn(3, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    with Arithmetic():
        inverse = torch.linalg.pinv(z)
        solved = torch.linalg.solve_triangular(z.triu(), z.mH, upper=True, left=False)
    torch.testing.assert_close(inverse @ z, torch.eye(3, dtype=z.dtype))
    torch.testing.assert_close(solved @ z.triu(), z.mH.resolve_conj())


def test_finite_step_of_a_complex_model_is_refused() -> None:
    """It would take a second imaginary unit."""
    x, v = point()
    with pytest.raises(NotImplementedError, match="h=None"):
        imstep.hvp(LOSSES["functions"], x, v, h=1e-3)
