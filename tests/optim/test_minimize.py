"""When `minimize` stops, and what it then claims."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from optim_cases import F64, normal, rosenbrock
from torch import Tensor, nn

import imstep
from imstep.globalization import Armijo, StepSearch, StrongWolfe, TaylorMonitor
from imstep.optim import ColumnNorms, IntermediateResult, LeastSquares, NewtonKrylov, StepOutcome, Termination
from imstep.optim.minimize import FROM_AFAR

W = torch.linspace(0.5, 2.5, 60, dtype=F64)
METHODS = ("newton-krylov", "least-squares")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def beale(x: Tensor) -> Tensor:
    y = torch.stack([x[1], x[1] ** 2, x[1] ** 3])
    return (vector(1.5, 2.25, 2.625) - x[0] * (1 - y)).square().sum()


def bumps(x: Tensor) -> Tensor:
    """No sum of squares, of any sign at its minimum."""
    return x.cosh().sum() + (2 * x.sum()).sin() - 3


def peak(p: Tensor) -> Tensor:
    return p[0] * torch.exp(-((W - p[1]) ** 2) / (2 * p[2] ** 2))


def hessian_at(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(function, x)


# --- units --------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "rosenbrock": (rosenbrock, vector(-1.2, 1.0, 0.5)),
    "beale": (beale, vector(1.0, 1.0)),
    "bumps": (bumps, vector(0.4, -1.0, 2.0)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("of_f", "of_x"), [(2.0**-40, 1.0), (2.0**40, 1.0), (1.0, 2.0**-24), (2.0**30, 2.0**24)])
def test_powers_of_two_change_nothing(name: str, of_f: float, of_x: float) -> None:
    function, start = FUNCTIONS[name]
    plain = imstep.minimize(function, start)
    scaled = imstep.minimize(lambda x: of_f * function(x / of_x), of_x * start)
    assert plain.success
    assert scaled.termination is plain.termination
    assert (scaled.nit, scaled.nfev) == (plain.nit, plain.nfev)
    assert torch.equal(scaled.x, of_x * plain.x)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("of_f", "of_x"), [(1e-12, 1.0), (1e12, 1.0), (1.0, 1e-12), (1e12, 1e12)])
def test_other_units_change_nothing_but_rounding(name: str, of_f: float, of_x: float) -> None:
    function, start = FUNCTIONS[name]
    plain = imstep.minimize(function, start)
    scaled = imstep.minimize(lambda x: of_f * function(x / of_x), of_x * start)
    assert scaled.success
    assert abs(scaled.nit - plain.nit) <= 1
    torch.testing.assert_close(scaled.x / of_x, plain.x, rtol=1e-9, atol=1e-9)


HILLS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, float]] = {
    "near the top": (lambda x: (x**4 - x**2).sum(), vector(1e-3, 1e-3), -0.5),
    "cosine": (lambda x: x.cos().sum(), vector(0.1, 0.2, 0), -3),
    "far from a dip": (lambda x: -(-x.square().sum()).exp(), vector(8, 0), -1),
    "plateau": (lambda x: x.square().sum().tanh(), vector(4, 0), 0),
    "almost straight": (lambda x: torch.nn.functional.softplus(x).sum() - 0.3 * x.sum(), vector(30, -30), 1.2217286),
    "rounded away": (lambda x: x.cosh().log().sum(), vector(50, -70), 0),
    "flat saddle": (lambda x: x[0] ** 2 - x[1] ** 4 + x[1] ** 6, vector(1, 1e-2), -4 / 27),
}


@pytest.mark.parametrize("name", HILLS)
@pytest.mark.parametrize("unit", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("step", [Armijo(forward=2.0), TaylorMonitor(), StrongWolfe()], ids=lambda s: type(s).__name__)
def test_hills_are_left_in_any_unit(name: str, unit: float, step: StepSearch) -> None:
    """Along -g no curvature says how far to go, and the length of a gradient is none of a step.

    Where curvature all but vanishes a step may be too long by more than its trials make good.
    """
    function, start, minimum = HILLS[name]
    result = imstep.minimize(lambda x: unit * function(x), start, step=step)
    assert result.success
    assert result.nit < 30
    assert result.fun / unit == pytest.approx(minimum, abs=1e-7)


@pytest.mark.parametrize("shift", [1.0, -7.0, 1e6])
def test_a_constant_costs_only_the_digits_that_it_takes(shift: float) -> None:
    result = imstep.minimize(lambda x: bumps(x) + shift, vector(0.4, -1.0, 2.0))
    expected = imstep.minimize(bumps, vector(0.4, -1.0, 2.0)).x
    assert result.success
    torch.testing.assert_close(result.x, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e7, 1e14])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*not recognised")
def test_a_peak_is_fitted_in_any_unit(unit: float, method: str) -> None:
    """1.2e-8 exp(-(w - 1.4)² / (2 0.11²)): f itself is 1e-16, where an absolute test sees nothing left to do."""
    data = peak(vector(1.2e-8 * unit, 1.4, 0.11))
    start = vector(1.5e-8 * unit, 1.6, 0.2)
    result = imstep.minimize(lambda p: (peak(p) - data).square().sum(), start, method)
    assert result.success
    # The sign of a width is of no account.
    torch.testing.assert_close(result.x.abs(), vector(1.2e-8 * unit, 1.4, 0.11), rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("time", "size"), [(1e12, 1e10), (1e30, 1.0)])
def test_second_derivatives_of_a_decay_may_leave_the_range_of_float32(time: float, size: float, method: str) -> None:
    t = torch.linspace(0, 4, 60, dtype=F64)
    expected = vector(3 * size, 0.8 / time, 0.5 * size)
    data = (expected[0] * torch.exp(-expected[1] * time * t) + expected[2]).float()
    times = (time * t).float()
    decay = lambda p: (p[0] * torch.exp(-p[1] * times) + p[2] - data).square().sum()
    result = imstep.minimize(decay, vector(size, 0.5 / time, 0.1 * size).float(), method)
    assert result.success
    torch.testing.assert_close(result.x.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_line_at_a_large_frequency_is_fitted_in_float32(method: str) -> None:
    frequencies = (1e25 * torch.linspace(0.5, 1.5, 80, dtype=F64)).float()
    line = lambda p: p[0] / (1 + ((frequencies - p[1]) / p[2]).square()) + p[3]
    expected = vector(2, 1.02e25, 1e24, 0.3)
    data = line(expected.float())
    start = vector(1, 1.05e25, 1.5e24, 0.1).float()
    result = imstep.minimize(lambda p: (line(p) - data).square().sum(), start, method)
    assert result.success
    torch.testing.assert_close(result.x.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unit", [1e-30, 1e18])
def test_variables_of_one_size_may_be_far_from_1_in_float32(unit: float, method: str) -> None:
    result = imstep.minimize(lambda x: rosenbrock(x / unit), torch.tensor([-1.2, 1.0]) * unit, method)
    assert result.success
    torch.testing.assert_close(result.x / unit, torch.ones(2), rtol=3e-4, atol=0)


def test_a_fit_with_noise_ends_at_the_precision() -> None:
    A, b = normal(40, 3), normal(40, seed=1)
    result = imstep.minimize(lambda x: (A @ x - b).square().sum(), torch.zeros(3, dtype=F64))
    assert result.success
    torch.testing.assert_close(result.x, torch.linalg.lstsq(A, b).solution, rtol=1e-9, atol=1e-10)


def test_a_steep_slope_is_no_minimum() -> None:
    """Tiny in f, and far from its minimum in x."""
    for function in (lambda x: 1e-30 * rosenbrock(x), lambda x: 1e-30 * (x - 3).square().sum()):
        result = imstep.minimize(function, vector(-1.2, 1.0), maxiter=1)
        assert result.success == bool(function(result.x) < 1e-45)
        assert result.nit == 1


def test_a_function_without_a_minimum_is_not_said_to_have_one() -> None:
    result = imstep.minimize(lambda x: (-x).exp().sum() - x.sum(), vector(1.0, 2.0), maxiter=40)
    assert not result.success
    assert result.status in (1, 2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("start", [[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0], [4.0, 8.4]])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[0] - x.square().sum(),
        lambda x: -x.pow(4).sum() + x[1],
        lambda x: x.pow(3).sum() + x[0] * x[1],
        lambda x: x[0] * x[1],
        lambda x: x[0] ** 4 - 5 * x[0] ** 2 - x[1] ** 2,
    ],
)
def test_a_function_that_falls_without_bound_is_said_to(
    function: Callable[[Tensor], Tensor], start: list[float], unit: float, dtype: torch.dtype
) -> None:
    result = imstep.minimize(lambda x: unit * function(x), torch.tensor(start, dtype=dtype))
    assert not result.success
    assert result.termination is Termination.UNBOUNDED


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e-6])
def test_a_deep_minimum_is_reached(offset: float) -> None:
    result = imstep.minimize(lambda x: 1e20 * ((x - 1e5).square().sum() - 2e10) + offset, vector(0.0, 1e-3))
    assert result.success
    torch.testing.assert_close(result.x, vector(1e5, 1e5))


# --- each test, by its argument -----------------------------------------------------------------------------------


def test_each_tolerance_stops_by_itself() -> None:
    start = vector(-1.2, 1.0, 0.3, -0.4)
    function = lambda x: rosenbrock(x) + 1
    off = {"ftol": 0.0, "xtol": 0.0, "gtol": 0.0}
    best = imstep.minimize(function, start)
    for name, value, termination in (
        ("gtol", 1e-3, Termination.GRADIENT),
        ("xtol", 1e-3, Termination.STEP),
        ("ftol", 1e-3, Termination.DECREASE),
    ):
        result = imstep.minimize(function, start, **{**off, name: value})
        assert result.termination is termination
        assert result.success
        assert result.nit < best.nit
    exact = imstep.minimize(function, start, **off)
    assert exact.termination in (Termination.PRECISION, Termination.GRADIENT)
    torch.testing.assert_close(exact.x, best.x, rtol=1e-9, atol=1e-9)


def test_tol_is_a_bound_on_the_gradient() -> None:
    result = imstep.minimize(rosenbrock, vector(-1.2, 1.0), tol=1e-3)
    assert result.termination is Termination.CONVERGED
    assert 1e-9 < result.grad.norm() <= 1e-3


@pytest.mark.parametrize("name", ["ftol", "xtol", "gtol", "tol"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_tolerances_that_mean_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is at least 0"):
        imstep.minimize(rosenbrock, vector(-1.2, 1.0), **{name: value})


# --- symmetries, and minima without curvature ---------------------------------------------------------------------


def lennard_jones(x: Tensor) -> Tensor:
    x = x.view(-1, 3)
    i, j = torch.triu_indices(len(x), len(x), 1)
    inverse = (x[i] - x[j]).square().sum(1) ** -3
    return 4 * (inverse**2 - inverse).sum()


@pytest.mark.parametrize(("atoms", "seed"), [(2, 0), (3, 0), (3, 1), (4, 1), (4, 3), (5, 2), (7, 2)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_lennard_jones_clusters(atoms: int, seed: int, offset: float) -> None:
    """Six directions without curvature; near a minimum theirs is within what the gradient leaves."""
    result = imstep.minimize(lennard_jones, normal(3 * atoms, seed=seed) + offset)
    values = torch.linalg.eigvalsh(hessian_at(lennard_jones, result.x))
    assert values[0] > -1e-6 * values[-1]
    assert result.grad.norm() < 1e-6
    assert result.success
    assert result.nfev < 130
    if atoms <= 4:
        assert result.fun == pytest.approx({2: -1, 3: -3, 4: -6}[atoms], rel=1e-12)


M = normal(6, 2, seed=3) @ normal(2, 5, seed=4)
WAVES = normal(24, 8, seed=5)
CLOUD = normal(12, 3, seed=6)
TURNED = CLOUD @ torch.linalg.qr(normal(3, 3, seed=7))[0].T


def factors(w: Tensor) -> Tensor:
    """‖U V - M‖² with 4 directions of symmetry, U V = (U A)(A⁻¹ V)."""
    return (w[:12].view(6, 2) @ w[12:].view(2, 5) - M).square().sum()


def phases(w: Tensor) -> Tensor:
    """Phase retrieval: a complex vector up to its phase, from moduli."""
    moduli = lambda z: (WAVES[:, :4] @ z[:4] - WAVES[:, 4:] @ z[4:]) ** 2 + (
        WAVES[:, :4] @ z[4:] + WAVES[:, 4:] @ z[:4]
    ) ** 2
    return (moduli(w) - moduli(normal(8, seed=8))).square().mean()


def procrustes(q: Tensor) -> Tensor:
    """A rotation as a quaternion of any length: a direction without curvature."""
    q = q / q.norm()
    w, x, y, z = q
    rotation = torch.stack(
        [
            torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]),
            torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]),
            torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]),
        ]
    )
    return (CLOUD @ rotation.T - TURNED).square().sum()


@pytest.mark.parametrize("function", [factors, phases, procrustes])
@pytest.mark.parametrize("seed", range(3))
def test_other_symmetries(function: Callable[[Tensor], Tensor], seed: int) -> None:
    start = normal({"factors": 22, "phases": 8, "procrustes": 4}[function.__name__], seed=seed)
    result = imstep.minimize(function, start)
    values = torch.linalg.eigvalsh(hessian_at(function, result.x))
    assert values[0] > -1e-6 * values[-1]
    assert result.grad.norm() < 1e-5 * values[-1]
    assert result.success


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x**4).sum(),
        lambda x: (x**4).sum() + 1,
        lambda x: ((x - 1) ** 4).sum(),
        lambda x: x[0] ** 6 + x[1] ** 2,
        lambda x: (x[0] + x[1] - 1) ** 2,
        lambda x: (x[0] + x[1] - 1) ** 4 + (x[0] - x[1]) ** 2 - 3,
        lambda x: 2 + 0 * x.sum(),
        lambda x: (x[0] * x[1]) ** 2,
    ],
)
@pytest.mark.parametrize("unit", [1.0, 2.0**-30])
def test_flat_minima(function: Callable[[Tensor], Tensor], unit: float) -> None:
    result = imstep.minimize(lambda x: unit * function(x), vector(1.5, -0.7))
    assert result.success
    (gradient,) = torch.autograd.grad(function(x := result.x.clone().requires_grad_()), x)
    assert gradient.norm() < 1e-9


# --- saddles ------------------------------------------------------------------------------------------------------

SADDLES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "saddle": (lambda x: (x[0] * x[1] - 1).square(), vector(0, 0)),
    "maximum": (lambda x: (x * x - 1).square().sum(), vector(0, 0, 0)),
    "maximum in one entry": (lambda x: torch.cat([x[:1] ** 2 - 1, 3 * x[1:]]).square().sum(), vector(0, 0)),
    "small": (lambda x: 1e-20 * (1e6 * x[0] * x[1] - 1).square(), vector(0, 0)),
}


@pytest.mark.parametrize("name", SADDLES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*not recognised")
def test_saddles_are_left(name: str, method: str) -> None:
    function, start = SADDLES[name]
    result = imstep.minimize(function, start, method)
    assert result.success
    assert result.fun < 1e-12 * function(start)


def test_the_optimizer_of_least_squares_looks_before_it_says_so() -> None:
    w = nn.Parameter(vector(0, 0))
    optimizer = LeastSquares([w])
    optimizer.step(lambda: (w[0] * w[1] - 1).square().mean())
    assert optimizer.last_step.outcome is StepOutcome.ACCEPTED
    assert w.detach()[0] * w.detach()[1] > 0
    bottom = nn.Parameter(vector(1, 1))
    optimizer = LeastSquares([bottom])
    optimizer.step(lambda: (bottom[0] * bottom[1] - 1).square().mean())
    assert optimizer.last_step.outcome is StepOutcome.CONVERGED
    assert optimizer.last_step.products > 0


def test_a_saddle_that_may_not_be_left_is_no_minimum() -> None:
    result = imstep.minimize(lambda x: (x[0] * x[1] - 1) ** 2 + x[2] ** 2, vector(0, 0, 1), maxiter=1)
    assert not result.success
    assert (result.nit, result.status) == (1, 1)


# --- counts, callbacks, interruptions -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_without_steps_the_start_is_looked_at(method: str) -> None:
    square = lambda x: (x - 3).square().sum()
    away, there = (imstep.minimize(square, vector(value), method, maxiter=0) for value in (0, 3))
    assert (away.nit, away.status, away.fun, away.grad.tolist()) == (0, 1, 9, [-6])
    assert (there.nit, there.status, there.fun) == (0, 0, 0)
    assert there.termination is Termination.GRADIENT
    assert imstep.minimize(lambda x: x.log().square().sum(), vector(-1), method, maxiter=0).status == 3
    with pytest.raises(ValueError, match="maxiter is at least 0"):
        imstep.minimize(square, vector(0), method, maxiter=-1)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda f: imstep.minimize(f, {"a": vector(1)}), TypeError, "Join several tensors"),
        (lambda f: imstep.minimize(f, [vector(1), vector(1, 2)]), TypeError, "Join several tensors"),
        (lambda f: imstep.minimize(f, torch.zeros(0, dtype=F64)), ValueError, "no entries"),
        (lambda f: imstep.minimize(f, [1, 2]), TypeError, "double"),
        (lambda f: imstep.minimize(f, vector(1), args=(2,)), TypeError, "lambda x: fun"),
        (lambda f: imstep.minimize(f, vector(1), "least-squares", jac=True), TypeError, "Derivatives are its own"),
        (lambda f: imstep.minimize(lambda x: x - 1, vector(1, 2), "least-squares"), ValueError, "residuals.square"),
        (lambda f: imstep.minimize(f, vector(1), scale="jac"), ValueError, 'leave it out with method="least-squares"'),
    ],
)
def test_what_is_meant_otherwise_is_refused(call: Callable[..., object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(lambda x: x.square().sum())


def test_a_start_that_is_not_finite_is_told() -> None:
    for entry in (math.nan, math.inf):
        result = imstep.minimize(lambda x: x.square().sum(), vector(entry, 1.0))
        assert result.termination is Termination.NON_FINITE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*not recognised")
def test_maxiter_is_the_number_of_steps(method: str) -> None:
    start = vector(-1.2, 1.0)
    function = lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]).square().sum()
    w = nn.Parameter(start.clone())
    newton = lambda: NewtonKrylov([w], tolerance=0.0, step=Armijo(forward=2.0), max_trials=30)
    least_squares = lambda: LeastSquares([w], tolerance=0.0, scaling=ColumnNorms(), damping=FROM_AFAR)
    optimizer = newton() if method == "newton-krylov" else least_squares()
    for steps in (1, 2, 3):
        optimizer.step(lambda: function(w))
        seen: list[Tensor] = []
        result = imstep.minimize(function, start, method, maxiter=steps, callback=seen.append)
        assert (result.nit, len(result.records), len(seen)) == (steps, steps, steps)
        assert torch.equal(result.x, w)
        assert torch.equal(seen[-1], w)
        assert (result.status, result.success) == (1, False)
        x = result.x.clone().requires_grad_()
        torch.testing.assert_close(result.grad, torch.autograd.grad(function(x), x)[0])


def test_evaluations_are_counted() -> None:
    calls = [0]

    def function(x: Tensor) -> Tensor:
        calls[0] += 1
        return rosenbrock(x)

    result = imstep.minimize(function, vector(-1.2, 1.0))
    assert result.nfev == calls[0]
    assert 0 < result.njev <= result.nfev
    assert result.nhev > 0


def test_callbacks_are_told_as_scipy_does() -> None:
    points: list[Tensor] = []
    results: list[IntermediateResult] = []
    plain = imstep.minimize(rosenbrock, vector(-1.2, 1.0), callback=lambda xk: points.append(xk))
    named = lambda intermediate_result: results.append(intermediate_result)
    imstep.minimize(rosenbrock, vector(-1.2, 1.0), callback=named)
    assert len(points) == len(results) == plain.nit
    for i, (x, result) in enumerate(zip(points, results, strict=True)):
        assert torch.equal(x, result.x)
        assert result.fun == pytest.approx(float(rosenbrock(x)), rel=1e-12, abs=1e-25)
        assert (result.nit, result.record.new_loss) == (i + 1, result.fun)
    assert torch.equal(points[-1], plain.x)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_callback_stops(scale: float | None) -> None:
    seen: list[Tensor] = []

    def third(x: Tensor) -> None:
        seen.append(x)
        if len(seen) == 3:
            raise StopIteration

    result = imstep.minimize(rosenbrock, vector(-1.2, 1.0), callback=third, scale=scale)
    assert (result.nit, result.status, result.success) == (3, 99, False)
    assert torch.equal(result.x, seen[-1])
    for yes in (True, np.bool_(True), torch.tensor(True), torch.tensor([True])):
        assert imstep.minimize(rosenbrock, vector(-1.2, 1.0), callback=lambda x, yes=yes: yes).nit == 1
    numbers = (np.bool_(False), torch.tensor(False), torch.tensor(1.0), torch.tensor([True, True]))
    for other in (False, 1, "stop", *numbers):
        assert imstep.minimize(rosenbrock, vector(-1.2, 1.0), callback=lambda x, other=other: other).success


@pytest.mark.parametrize("dtype", [">f8", np.longdouble])
def test_a_start_may_be_an_array_as_files_hold_it(dtype: object) -> None:
    result = imstep.minimize(rosenbrock, np.array([-1.2, 1.0]).astype(dtype))
    assert torch.equal(result.x, imstep.minimize(rosenbrock, vector(-1.2, 1.0)).x)


def test_the_result_reads_as_a_table() -> None:
    result = imstep.minimize(rosenbrock, np.array([-1.2, 1.0]))
    lines = repr(result).splitlines()
    names = [line.split(":")[0].strip() for line in lines if ": " in line[:11]]
    assert names == ["message", "success", "status", "fun", "x", "grad", "nit", "nfev", "njev", "nhev"]
    assert "True" in lines[1]
    assert result.status == 0


def test_derivatives_that_lie_are_no_minimum() -> None:
    """A kink: gradients of 1 or -1 on both sides of the minimum and at it."""
    kink = lambda x: torch.where(x > 0.3, x - 0.3, 0.3 - x).sum() + 1
    result = imstep.minimize(kink, vector(1.0, -2.0), maxiter=60)
    assert not result.success


def test_least_squares_with_residuals_that_stay_large() -> None:
    """Brown and Dennis (number 16 of Moré, Garbow and Hillstrom): what J shows of the curvature is the lesser part."""
    t = torch.arange(1, 21, dtype=F64) / 5
    residuals = lambda x: (x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2
    result = imstep.minimize(lambda x: residuals(x).square().sum(), vector(25, 5, -5, -1), "least-squares", maxiter=100)
    assert result.success
    assert abs(result.fun - 85822.2) < 0.1


@pytest.mark.parametrize(
    "options", [{"maxiter": None}, {"maxiter": "3"}, {"tol": "1e-3"}, {"xtol": [1e-3]}, {"callback": 3}]
)
def test_arguments_of_other_kinds_are_named(options) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        imstep.minimize(lambda x: x.square().sum(), torch.ones(2), **options)
