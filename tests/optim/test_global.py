"""Where the optimizer arrives from far away; whole and beside SciPy: benchmarks/more_garbow_hillstrom."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import imstep
from benchmarks.more_garbow_hillstrom.__main__ import network_case, rosenbrock_cases
from benchmarks.more_garbow_hillstrom.problems import FUNCTIONS, SumOfSquares
from imstep.optim import MinimizeResult, Termination

F64 = torch.float64
# Curvatures from 1e-2 to 1e14 at the minimum: rounding alone leaves gradients far above the tolerance.
BEYOND_PRECISION = {10}
SMALLEST = {f.number: f for f in reversed(FUNCTIONS) if f.number not in BEYOND_PRECISION}
# Residuals near 1e-3 are differences of numbers near 1: of their squares' sum rounding leaves 5e-13 at most.
ROUNDING = {17: 5e-13}
FROM_AFAR = (1, 2, 4, 5, 7, 8, 9, 12, 13, 14, 16, 20, 22, 23, 25, 30, 35)


def arrive(function: Callable[[Tensor], Tensor], start: Tensor, steps: int, rounding: float = 1e-14) -> MinimizeResult:
    """A minimum to second order, by PyTorch's derivatives, to which the way led downhill only."""
    result = imstep.minimize(function, start, tol=1e-8, maxiter=steps)
    for record in result.records:
        # Where two losses may differ by rounding only, slopes decide.
        assert record.new_loss <= record.loss + rounding * abs(record.loss)
    x = result.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x)
    assert gradient.norm() <= 1.01e-8
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(function, result.x))
    assert values[0] >= -1e-8 * max(1, float(values[-1]))
    assert result.success
    return result


def at_a_published_minimum(f: float, function: SumOfSquares) -> bool:
    return any(math.isclose(f, minimum, rel_tol=1e-5, abs_tol=1e-8) for minimum in function.minima)


@pytest.mark.parametrize("number", sorted(SMALLEST))
def test_more_garbow_hillstrom(number: int) -> None:
    function = SMALLEST[number]
    result = arrive(function, function.start, 500, ROUNDING.get(number, 1e-14))
    # The trigonometric function has further local minima; this one is well known, too.
    assert at_a_published_minimum(result.fun, function) or (number == 26 and result.fun == pytest.approx(2.79506e-5))


@pytest.mark.parametrize("number", FROM_AFAR)
def test_more_garbow_hillstrom_from_ten_times_the_start(number: int) -> None:
    function = SMALLEST[number]
    result = arrive(function, function.start_at(10.0), 300)
    assert at_a_published_minimum(result.fun, function)


@pytest.mark.parametrize(("factor", "scaled"), [(1.0, False), (10.0, True)])
def test_meyer_ends_where_the_precision_does(factor: float, scaled: bool) -> None:
    (function,) = (f for f in FUNCTIONS if f.number in BEYOND_PRECISION)
    start = function.start_at(factor)
    result = imstep.minimize(function, start, maxiter=400, scale=start if scaled else None)
    assert result.termination is Termination.PRECISION
    assert at_a_published_minimum(result.fun, function)
    rounding = torch.finfo(F64).eps * (torch.autograd.functional.hessian(function, result.x).abs() @ result.x.abs())
    assert (result.grad.abs() <= 10 * rounding).all()


def test_a_scale_is_a_change_of_units() -> None:
    rosenbrock = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    start, units = torch.tensor([-1.2, 1.0, 0.5], dtype=F64), torch.tensor([2.0**20, 1.0, 2.0**-30], dtype=F64)
    plain = imstep.minimize(rosenbrock, start)
    scaled = imstep.minimize(lambda x: rosenbrock(x / units), units * start, scale=units)
    assert torch.equal(scaled.x, units * plain.x)
    assert torch.equal(scaled.grad, plain.grad / units)
    assert scaled.nit == plain.nit


@pytest.mark.parametrize(
    ("scale", "message"),
    [([1.0, 0.0], "positive"), (-1.0, "positive"), (math.inf, "finite"), ([1.0], r"\(1,\), x0 \(2,\)")],
)
def test_scales_that_mean_nothing_are_refused(scale: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imstep.minimize(lambda x: x.square().sum(), [1.0, 2.0], scale=scale)


def test_curvature_that_falls_by_fifty_orders_of_magnitude() -> None:
    """Damping must not stay where the first gradient has put it."""
    (function,) = (f for f in FUNCTIONS if (f.number, f.size) == (27, 40))
    arrive(function, function.start_at(10.0), 400)


@pytest.mark.parametrize("name", ["n = 20, 10x", "n = 50, random 1"])
def test_rosenbrock_in_many_dimensions(name: str) -> None:
    (case,) = (case for case in rosenbrock_cases() if case.name.endswith(name))
    assert arrive(case.function, case.start, 600).fun < 4  # a local minimum lies at 3.99


@pytest.mark.parametrize("seed", [0, 5, 11, 15, 17])
def test_random_networks(seed: int) -> None:
    case = network_case(seed)
    arrive(case.function, case.start, 300)


def test_the_functions_are_those_of_the_paper() -> None:
    assert {f.number for f in FUNCTIONS} == set(range(1, 36))
    counts = {f.number: f.residual_count for f in FUNCTIONS if f.number in (8, 10, 11, 16, 17, 18, 19, 20)}
    assert counts == {8: 15, 10: 16, 11: 99, 16: 20, 17: 33, 18: 13, 19: 65, 20: 31}


ZEROS = {
    2: (5, 4),
    4: (1e6, 2e-6),
    5: (3, 0.5),
    7: (1, 0, 0),
    11: (50, 25, 1.5),
    12: (1, 10, 1),
    14: (1, 1, 1, 1),
    18: (1, 10, 1, 5, 4, 3),
    25: (1,) * 10,
    27: (1,) * 10,
}


@pytest.mark.parametrize("number", ZEROS)
def test_published_zeros(number: int) -> None:
    assert SMALLEST[number](torch.tensor(ZEROS[number], dtype=F64)) <= 1e-16
