"""The Allen-Cahn equation, with a Fourier spectral solution."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from imstep import pde
from imstep.tasks.models import Periodic, mlp
from imstep.tasks.physics import Condition, PhysicsTask, Reference
from imstep.tasks.sampling import box, face

__all__ = ["TASKS", "allen_cahn_solution"]

SIDES = [(-1.0, 1.0), (0.0, 1.0)]
DIFFUSION, RATE = 1e-4, 5.0
COLUMNS = 512


@lru_cache
def allen_cahn_solution(modes: int = 2048, steps: int = 1000, kept: int = 100) -> Tensor:
    """u with u_t = 1e-4 u_xx + 5 (u - u³), u(x, 0) = x² cos πx, periodic on [-1, 1]: (kept + 1, 512).

    Rows are the times 0, 1/kept, ..., 1; columns x = -1 + j/256. In Fourier space diffusion is integrated exactly
    and the rest by the fourth-order exponential method; the integrals over a circle are free of cancellation.

    Args:
        modes: of the Fourier series, a multiple of 512.
        steps: in time, a multiple of ``kept``.
        kept: times kept after the first.

    Source: Cox and Matthews, J. Comput. Phys. 176 (2002), p. 430; Kassam and Trefethen, SIAM J. Sci. Comput. 26 (2005),
        p. 1214.
    """
    frequency = math.pi * torch.fft.rfftfreq(modes, 1 / modes, dtype=torch.float64)
    h = 1 / steps
    linear = -DIFFUSION * frequency.square() + RATE
    circle = torch.exp(1j * math.pi * (torch.arange(32, dtype=torch.float64) + 0.5) / 32)
    z = h * linear[:, None] + circle
    mean = lambda f: h * f.mean(1).real
    half = mean(((z / 2).exp() - 1) / z)
    first = mean((-4 - z + z.exp() * (4 - 3 * z + z**2)) / z**3)
    middle = mean((2 + z + z.exp() * (z - 2)) / z**3)
    last = mean((-4 - 3 * z - z**2 + z.exp() * (4 - z)) / z**3)
    whole, part = (h * linear).exp(), (h * linear / 2).exp()
    cubic = lambda v: -RATE * torch.fft.rfft(torch.fft.irfft(v, modes) ** 3)
    u = modes * _initial_coefficients(modes // 2 + 1)
    shown = lambda v: torch.fft.irfft(v, modes)[:: modes // COLUMNS]
    x = -1 + 2 * torch.arange(COLUMNS, dtype=torch.float64) / COLUMNS
    rows = [x.square() * torch.cos(math.pi * x)]
    for step in range(1, steps + 1):
        at_u = cubic(u)
        a = part * u + half * at_u
        at_a = cubic(a)
        at_b = cubic(part * u + half * at_a)
        at_c = cubic(part * a + half * (2 * at_b - at_u))
        u = whole * u + first * at_u + 2 * middle * (at_a + at_b) + last * at_c
        if step % (steps // kept) == 0:
            rows.append(shown(u))
    return torch.stack(rows)


def _initial_coefficients(count: int) -> Tensor:
    """The Fourier coefficients of x² cos πx about x = -1, (count,) complex.

    In closed form: at the ends the function has a kink, and samples of it would alias.
    """
    k = torch.arange(count, dtype=torch.float64)
    near = k - 1 + (k == 1)
    of_sum = 4 * torch.cos(math.pi * (k + 1)) / (math.pi * (k + 1)) ** 2
    of_difference = torch.where(k == 1, 2 / 3, 4 * torch.cos(math.pi * near) / (math.pi * near) ** 2)
    return (torch.cos(math.pi * k) * (of_sum + of_difference) / 4).to(torch.complex128)


def _equation(u: nn.Module, x: Tensor) -> Tensor:
    expansion = pde.expand(u, x, second=[0])
    assert expansion.second is not None
    value = expansion.value
    return expansion.first[..., 1] - DIFFUSION * expansion.second[..., 0] - RATE * (value - value**3)


def _initial(u: nn.Module, x: Tensor) -> Tensor:
    return u(x) - x[:, :1].square() * torch.cos(math.pi * x[:, :1])


def _reference() -> Reference:
    values = allen_cahn_solution()
    times, modes = values.shape
    x = -1 + 2 * torch.arange(modes, dtype=torch.float64) / modes
    t = torch.linspace(0, 1, times, dtype=torch.float64)
    points = torch.stack([x.repeat(times), t.repeat_interleave(modes)], 1)
    return Reference(points, values.reshape(-1, 1), shape=(times, modes))


TASKS = (
    PhysicsTask(
        "allen-cahn",
        "Allen-Cahn equation",
        "u_t = 1e-4 u_xx + 5 (u - u³), u(x, 0) = x² cos πx, periodic by its inputs; 4,000 + 300 points, the initial "
        "values with weight 100; tanh MLP 3-50-50-50-50-1. Held out: relative L2 error.",
        lambda: nn.Sequential(Periodic(0, 2.0), mlp((3, 50, 50, 50, 50, 1))),
        (
            Condition("equation", _equation, box(SIDES), 4000),
            Condition("initial", _initial, face(SIDES, 1, 0.0), 300, weight=100.0),
        ),
        _reference,
    ),
)
