"""The 35 test functions of Moré, Garbow and Hillstrom, as sums of squares.

f(x) = Σ r_i(x)²

Source: Moré, Garbow and Hillstrom, Testing Unconstrained Optimization Software, ACM TOMS 7 (1981), 17-41, section 3;
the numbers are theirs. Number 11 is meant as |y_i - x2|: the printed |y_i m i x2| is a known misprint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64


@dataclass(frozen=True, eq=False)
class SumOfSquares:
    """A sum of squares.

    Attributes:
        number: in the paper.
        name: in the paper.
        residuals: x (n,) -> r (m,).
        start: the standard start, (n,), float64.
        minima: published values of f at local minima; also those that are approached at infinity.
    """

    number: int
    name: str
    residuals: Callable[[Tensor], Tensor]
    start: Tensor
    minima: tuple[float, ...] = (0.0,)

    @property
    def size(self) -> int:
        """The number n of variables."""
        return len(self.start)

    @property
    def residual_count(self) -> int:
        """The number m of squares."""
        return len(self.residuals(self.start))

    def __call__(self, x: Tensor) -> Tensor:
        return self.residuals(x).square().sum()

    def start_at(self, factor: float) -> Tensor:
        """A multiple of the standard start; where that is zero, all entries are the factor itself, as in MINPACK."""
        return factor * self.start if self.start.any() or factor == 1 else torch.full_like(self.start, factor)


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def _count(first: int, last: int) -> Tensor:
    return torch.arange(first, last + 1, dtype=F64)


# --- of fixed size --------------------------------------------------------------------------------------------------


def _powell_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, (-x).exp().sum() - 1.0001])


def _freudenstein_and_roth(x: Tensor) -> Tensor:
    return torch.stack([-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


def _helical_valley(x: Tensor) -> Tensor:
    turns = torch.atan(x[1] / x[0]) / (2 * math.pi) + 0.5 * (x[0] < 0)
    return torch.stack([10 * (x[2] - 10 * turns), 10 * (x[:2].square().sum().sqrt() - 1), x[2]])


def _bard(x: Tensor) -> Tensor:
    y = _vector(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)
    u = _count(1, 15)
    v = 16 - u
    return y - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def _gaussian(x: Tensor) -> Tensor:
    half = (0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521)
    t = (8 - _count(1, 15)) / 2
    return x[0] * (-x[1] * (t - x[2]) ** 2 / 2).exp() - _vector(*half, 0.3989, *reversed(half))


def _meyer(x: Tensor) -> Tensor:
    y = _vector(
        34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872
    )  # fmt: skip
    return x[0] * (x[1] / (45 + 5 * _count(1, 16) + x[2])).exp() - y


def _gulf(x: Tensor) -> Tensor:
    t = _count(1, 99) / 100
    y = 25 + (-50 * t.log()) ** (2 / 3)
    return (-((y - x[1]).abs() ** x[2]) / x[0]).exp() - t


def _box(x: Tensor) -> Tensor:
    t = _count(1, 10) / 10
    return (-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())


def _powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x.reshape(-1, 4).unbind(1)
    return torch.cat([a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2])


def _wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    return torch.stack(
        [
            10 * (b - a**2),
            1 - a,
            math.sqrt(90) * (d - c**2),
            1 - c,
            math.sqrt(10) * (b + d - 2),
            (b - d) / math.sqrt(10),
        ]
    )


def _kowalik_and_osborne(x: Tensor) -> Tensor:
    y = _vector(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
    u = _vector(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def _brown_and_dennis(x: Tensor) -> Tensor:
    t = _count(1, 20) / 5
    return (x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2


def _osborne_1(x: Tensor) -> Tensor:
    y = _vector(
        0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603,
        0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411,
        0.406,
    )  # fmt: skip
    t = 10 * _count(0, 32)
    return y - (x[0] + x[1] * (-t * x[3]).exp() + x[2] * (-t * x[4]).exp())


def _biggs_exp6(x: Tensor) -> Tensor:
    t = _count(1, 13) / 10
    y = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return x[2] * (-t * x[0]).exp() - x[3] * (-t * x[1]).exp() + x[5] * (-t * x[4]).exp() - y


def _osborne_2(x: Tensor) -> Tensor:
    y = _vector(
        1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606,
        0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423,
        0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
        0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098,
        0.054,
    )  # fmt: skip
    t = _count(0, 64) / 10
    bumps = sum(x[1 + k] * (-((t - x[8 + k]) ** 2) * x[5 + k]).exp() for k in range(3))
    return y - (x[0] * (-t * x[4]).exp() + bumps)


# --- of any size ----------------------------------------------------------------------------------------------------


def _rosenbrock(x: Tensor) -> Tensor:
    return torch.cat([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]])


def _watson(x: Tensor) -> Tensor:
    power = _count(0, len(x) - 1)
    t = (_count(1, 29) / 29).unsqueeze(1)
    fitted = (power[1:] * t ** power[:-1]) @ x[1:] - ((t**power) @ x) ** 2 - 1
    return torch.cat([fitted, x[:1], x[1:2] - x[:1] ** 2 - 1])


def _penalty_1(x: Tensor) -> Tensor:
    return torch.cat([math.sqrt(1e-5) * (x - 1), x.square().sum().reshape(1) - 0.25])


def _penalty_2(x: Tensor) -> Tensor:
    n, root = len(x), math.sqrt(1e-5)
    e, i = (x / 10).exp(), _count(2, len(x))
    pairs = e[1:] + e[:-1] - (i / 10).exp() - ((i - 1) / 10).exp()
    last = (_count(1, n).flip(0) * x**2).sum().reshape(1) - 1
    return torch.cat([x[:1] - 0.2, root * pairs, root * (e[1:] - math.exp(-0.1)), last])


def _variably_dimensioned(x: Tensor) -> Tensor:
    moment = (_count(1, len(x)) * (x - 1)).sum().reshape(1)
    return torch.cat([x - 1, moment, moment**2])


def _trigonometric(x: Tensor) -> Tensor:
    return len(x) - x.cos().sum() + _count(1, len(x)) * (1 - x.cos()) - x.sin()


def _brown_almost_linear(x: Tensor) -> Tensor:
    return torch.cat([x[:-1] + x.sum() - (len(x) + 1), x.prod().reshape(1) - 1])


def _grid(n: int) -> Tensor:
    return _count(1, n) / (n + 1)


def _cubed(x: Tensor) -> Tensor:
    return (x + _grid(len(x)) + 1) ** 3


def _before(x: Tensor, by: int = 1) -> Tensor:
    """x_{i-by}, and 0 where there is none."""
    return torch.cat([x.new_zeros(by), x[:-by]])


def _after(x: Tensor) -> Tensor:
    return torch.cat([x[1:], x.new_zeros(1)])


def _discrete_boundary_value(x: Tensor) -> Tensor:
    return 2 * x - _before(x) - _after(x) + _cubed(x) / (2 * (len(x) + 1) ** 2)


def _discrete_integral_equation(x: Tensor) -> Tensor:
    t, cubed = _grid(len(x)), _cubed(x)
    up_to = (t * cubed).cumsum(0)
    beyond = ((1 - t) * cubed).sum() - ((1 - t) * cubed).cumsum(0)
    return x + ((1 - t) * up_to + t * beyond) / (2 * (len(x) + 1))


def _broyden_tridiagonal(x: Tensor) -> Tensor:
    return (3 - 2 * x) * x - _before(x) - 2 * _after(x) + 1


def _broyden_banded(x: Tensor) -> Tensor:
    y = x * (1 + x)
    band = sum((_before(y, by) for by in range(1, min(6, len(x)))), _after(y))
    return x * (2 + 5 * x**2) + 1 - band


def _linear_full_rank(x: Tensor, m: int) -> Tensor:
    return torch.cat([x, x.new_zeros(m - len(x))]) - 2 / m * x.sum() - 1


def _linear_rank_1(x: Tensor, m: int) -> Tensor:
    return _count(1, m) * (_count(1, len(x)) * x).sum() - 1


def _linear_rank_1_with_zeros(x: Tensor, m: int) -> Tensor:
    factors = _count(0, m - 1)
    factors[-1] = 0
    return factors * (_count(2, len(x) - 1) * x[1:-1]).sum() - 1


def _chebyquad(x: Tensor) -> Tensor:
    z = 2 * x - 1
    polynomials = [torch.ones_like(z), z]
    while len(polynomials) <= len(x):
        polynomials.append(2 * z * polynomials[-1] - polynomials[-2])
    integrals = _vector(*(-1 / (i * i - 1) if i % 2 == 0 else 0.0 for i in range(1, len(x) + 1)))
    return torch.stack(polynomials[1:]).mean(1) - integrals


# --- all of them ----------------------------------------------------------------------------------------------------

SIZES = {
    20: (6, 9, 12),
    21: (10, 50),
    22: (12, 48),
    23: (4, 10),
    24: (4, 10),
    25: (10, 50),
    26: (10, 50),
    27: (10, 40),
    28: (10, 50),
    29: (10, 50),
    30: (10, 50),
    31: (10, 50),
    32: (10,),
    33: (10,),
    34: (10,),
    35: (7, 8, 9, 10),
}
"""Number of a function of any size -> the sizes n to take."""

_FIXED: tuple[SumOfSquares, ...] = (
    SumOfSquares(1, "Rosenbrock", _rosenbrock, _vector(-1.2, 1)),
    SumOfSquares(2, "Freudenstein and Roth", _freudenstein_and_roth, _vector(0.5, -2), (0.0, 48.9842)),
    SumOfSquares(3, "Powell badly scaled", _powell_badly_scaled, _vector(0, 1)),
    SumOfSquares(
        4,
        "Brown badly scaled",
        lambda x: torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2]),
        _vector(1, 1),
    ),
    SumOfSquares(5, "Beale", lambda x: _vector(1.5, 2.25, 2.625) - x[0] * (1 - x[1] ** _count(1, 3)), _vector(1, 1)),
    SumOfSquares(
        6,
        "Jennrich and Sampson",
        lambda x: 2 + 2 * _count(1, 10) - (_count(1, 10) * x[0]).exp() - (_count(1, 10) * x[1]).exp(),
        _vector(0.3, 0.4),
        (124.362,),
    ),
    SumOfSquares(7, "Helical valley", _helical_valley, _vector(-1, 0, 0)),
    SumOfSquares(8, "Bard", _bard, _vector(1, 1, 1), (8.21487e-3, 17.4286)),
    SumOfSquares(9, "Gaussian", _gaussian, _vector(0.4, 1, 0), (1.12793e-8,)),
    SumOfSquares(10, "Meyer", _meyer, _vector(0.02, 4000, 250), (87.9458,)),
    SumOfSquares(11, "Gulf research and development", _gulf, _vector(5, 2.5, 0.15)),
    SumOfSquares(12, "Box three-dimensional", _box, _vector(0, 10, 20)),
    SumOfSquares(13, "Powell singular", _powell_singular, _vector(3, -1, 0, 1)),
    SumOfSquares(14, "Wood", _wood, _vector(-3, -1, -3, -1)),
    SumOfSquares(
        15,
        "Kowalik and Osborne",
        _kowalik_and_osborne,
        _vector(0.25, 0.39, 0.415, 0.39),
        (3.07505e-4, 1.02734e-3),
    ),
    SumOfSquares(16, "Brown and Dennis", _brown_and_dennis, _vector(25, 5, -5, -1), (85822.2,)),
    SumOfSquares(17, "Osborne 1", _osborne_1, _vector(0.5, 1.5, -1, 0.01, 0.02), (5.46489e-5,)),
    SumOfSquares(18, "Biggs EXP6", _biggs_exp6, _vector(1, 2, 1, 1, 1, 1), (5.65565e-3, 0.0)),
    SumOfSquares(
        19, "Osborne 2", _osborne_2, _vector(1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), (4.01377e-2,)
    ),
)


def _extended(number: int, n: int) -> SumOfSquares:
    """A function of any size, at size n."""
    ones, count, grid, m = torch.ones(n, dtype=F64), _count(1, n), _grid(n), 2 * n
    watson = {6: 2.28767e-3, 9: 1.39976e-6, 12: 4.72238e-10}
    penalties = {(23, 4): 2.24997e-5, (23, 10): 7.08765e-5, (24, 4): 9.37629e-6, (24, 10): 2.93660e-4}
    chebyquad = {8: 3.51687e-3, 10: 6.50395e-3}
    makers: dict[int, Callable[[], tuple[str, Callable[[Tensor], Tensor], Tensor, Sequence[float]]]] = {
        20: lambda: ("Watson", _watson, 0 * ones, [watson[n]]),
        21: lambda: ("Extended Rosenbrock", _rosenbrock, _vector(-1.2, 1).repeat(n // 2), [0]),
        22: lambda: ("Extended Powell singular", _powell_singular, _vector(3, -1, 0, 1).repeat(n // 4), [0]),
        23: lambda: ("Penalty I", _penalty_1, count, [penalties[23, n]]),
        24: lambda: ("Penalty II", _penalty_2, 0.5 * ones, [penalties[24, n]]),
        25: lambda: ("Variably dimensioned", _variably_dimensioned, 1 - count / n, [0]),
        26: lambda: ("Trigonometric", _trigonometric, ones / n, [0]),
        27: lambda: ("Brown almost-linear", _brown_almost_linear, 0.5 * ones, [0, 1]),
        28: lambda: ("Discrete boundary value", _discrete_boundary_value, grid * (grid - 1), [0]),
        29: lambda: ("Discrete integral equation", _discrete_integral_equation, grid * (grid - 1), [0]),
        30: lambda: ("Broyden tridiagonal", _broyden_tridiagonal, -ones, [0]),
        31: lambda: ("Broyden banded", _broyden_banded, -ones, [0]),
        32: lambda: ("Linear, full rank", lambda x: _linear_full_rank(x, m), ones, [m - n]),
        33: lambda: ("Linear, rank 1", lambda x: _linear_rank_1(x, m), ones, [m * (m - 1) / (2 * (2 * m + 1))]),
        34: lambda: (
            "Linear, rank 1 with zero columns and rows",
            lambda x: _linear_rank_1_with_zeros(x, m),
            ones,
            [(m * m + 3 * m - 6) / (2 * (2 * m - 3))],
        ),
        35: lambda: ("Chebyquad", _chebyquad, grid, [chebyquad.get(n, 0)]),
    }
    name, residuals, start, minima = makers[number]()
    return SumOfSquares(number, name, residuals, start, tuple(minima))


FUNCTIONS = (*_FIXED, *(_extended(number, n) for number, sizes in SIZES.items() for n in sizes))
"""All 35, those of any size at several sizes."""
