"""Fits by ``minimize(method="least-squares")``: against NIST's certified values, SciPy and linear algebra."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from optim_cases import F64, normal
from torch import Tensor, nn

import imstep
from benchmarks.more_garbow_hillstrom.problems import FUNCTIONS
from benchmarks.nist.problems import REGRESSIONS
from imstep.curvature.staleness import StaleLossError
from imstep.optim import ColumnNorms, LeastSquares, MinimizeResult, StepOutcome, Termination

SETS = {regression.name: regression for regression in REGRESSIONS}
T = torch.linspace(0, 1, 50, dtype=F64)
Y = 2 * T + 1 + 0.1 * normal(50)


def fit(fun: Callable[[Tensor], Tensor], x0: Any, **options: Any) -> MinimizeResult:
    return imstep.minimize(fun, x0, "least-squares", **options)


# --- the sets of NIST, and of Moré, Garbow and Hillstrom ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"),
    [("Misra1a", 0), ("Misra1c", 0), ("BoxBOD", 0), ("Rat43", 0), ("Rat42", 0), ("Nelson", 0), ("Bennett5", 1),
     ("Lanczos1", 0), ("Lanczos3", 1), ("MGH17", 1), ("MGH10", 1), ("Roszman1", 0), ("Chwirut2", 0), ("Hahn1", 0),
     ("Eckerle4", 0), ("DanWood", 1), ("Gauss2", 1), ("Kirby2", 0)],
)  # fmt: skip
def test_certified_values(name: str, start: int) -> None:
    """All 54 runs: ``benchmarks/nist``."""
    regression = SETS[name]
    result = fit(regression, regression.starts[start])
    assert result.success, result.message
    assert regression.digits(result.x) > 7


@pytest.mark.parametrize("number", [3, 4, 8, 10, 15, 17])
def test_badly_scaled_functions(number: int) -> None:
    function = next(f for f in FUNCTIONS if f.number == number)
    result = fit(function, function.start)
    assert result.success
    assert min(abs(result.fun - f) - 1e-5 * f for f in function.minima) < 1e-12


@pytest.mark.parametrize(("number", "least"), [(3, 0.0), (10, 87.9458)])
def test_badly_scaled_functions_in_single_precision(number: int, least: float) -> None:
    function = next(f for f in FUNCTIONS if f.number == number)
    result = fit(function, function.start.float())
    assert result.success
    assert result.fun < 1.001 * least + 1e-9


# --- starts that are far --------------------------------------------------------------------------------------------

TIMES = torch.linspace(0, 4, 40, dtype=F64)
FAR: dict[str, tuple[Callable[[Tensor], Tensor], list[float], list[float]]] = {
    "a decay that explodes": (lambda b: b[0] * torch.exp(b[1] * TIMES), [2.0, -0.7], [1.0, 5.0]),
    "a power that explodes": (lambda b: b[0] * (TIMES + 0.5) ** b[1], [3.0, 1.5], [1.0, 30.0]),
    "a power that vanishes": (lambda b: b[0] * (TIMES + 0.5) ** b[1], [3.0, 1.5], [1.0, -50.0]),
}


@pytest.mark.parametrize("name", FAR)
def test_a_ridge_far_from_the_data_is_left(name: str) -> None:
    """There one column of J is many orders of magnitude smaller than at the start."""
    model, solution, start = FAR[name]
    y = model(torch.tensor(solution, dtype=F64)) + 0.01 * normal(40)
    result = fit(lambda b: (model(b) - y).square().sum(), torch.tensor(start, dtype=F64))
    expected = scipy.optimize.least_squares(lambda b: (model(torch.tensor(b)) - y).numpy(), solution)
    assert result.success
    torch.testing.assert_close(result.x, torch.tensor(expected.x), rtol=1e-4, atol=0)


def test_columns_that_vanish_tell_no_size() -> None:
    """One exponential has died away; what is large about it makes no step of the others small."""
    y = 2 * torch.exp(-0.5 * TIMES) + torch.exp(-3 * TIMES) + 0.01 * normal(40)
    model = lambda b: b[0] * torch.exp(-b[1] * TIMES) + b[2] * torch.exp(-b[3] * TIMES)
    result = fit(lambda b: (model(b) - y).square().sum(), torch.tensor([1.0, -10.0, 1.0, 5.0], dtype=F64))
    J = torch.func.jacrev(model)(result.x)
    assert result.success
    assert float((J.T @ (model(result.x) - y)).abs().max()) < 1e-8


@pytest.mark.parametrize("start", [[1.0, 30.0, 0.3], [1.0, 2.0, 1e-3], [5.0, 2.0, 30.0]])
def test_a_plateau_is_no_minimum(start: list[float]) -> None:
    """A peak off the data, one between two of them, and a logistic curve off them."""
    if start[0] == 1:
        model = lambda b: b[0] * torch.exp(-(((TIMES - b[1]) / b[2]) ** 2) / 2)
        y = model(torch.tensor([3.0, 2.0, 0.3], dtype=F64))
    else:
        model = lambda b: b[0] / (1 + torch.exp(-b[1] * (TIMES - b[2])))
        y = model(torch.tensor([5.0, 2.0, 2.0], dtype=F64))
    result = fit(lambda b: (model(b) - y).square().sum(), torch.tensor(start, dtype=F64))
    assert not result.success
    assert result.termination is Termination.FLAT


@pytest.mark.parametrize("unit", [1e-20, 1e-25])
def test_squares_that_vanish_are_refused(unit: float) -> None:
    """In float32 the loss is 0 there, and its gradient; further up the fit is the same."""
    y = 2 * torch.exp(-0.7 * TIMES.float())
    f = lambda unit: lambda b: (unit * (b[0] * torch.exp(b[1] * TIMES.float()) - y)).square().sum()
    with pytest.raises(ValueError, match=r"squares of residuals of .* leave the range of torch.float32"):
        fit(f(unit), torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(fit(f(1e-17), torch.tensor([1.0, -2.0])).x, torch.tensor([2.0, -0.7]), rtol=1e-5, atol=0)


# --- lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1.0, 1e7, 1e-9])
@pytest.mark.parametrize("width", [1.0, 1e-6])
def test_line(unit: float, width: float) -> None:
    """To rounding, whatever the units of y and t."""
    A = torch.stack([width * T, torch.ones_like(T)], 1)
    result = fit(lambda x: (A @ x - unit * Y).square().sum(), torch.zeros(2, dtype=F64))
    assert result.success
    expected = torch.from_numpy(np.linalg.lstsq(A.numpy(), (unit * Y).numpy())[0])
    assert ((result.x - expected) / expected).abs().max() < 1e-13


def test_line_in_single_precision() -> None:
    A = torch.stack([T, torch.ones_like(T)], 1)
    result = fit(lambda x: (A.float() @ x - Y.float()).square().sum(), torch.zeros(2))
    assert result.success
    torch.testing.assert_close(result.x.double(), torch.linalg.lstsq(A, Y).solution, rtol=5e-7, atol=0)


def test_steps_do_not_depend_on_units() -> None:
    """Parameters in other units, powers of two, take the same steps bit for bit."""
    units, paths = torch.tensor([2.0**20, 2.0**-30, 1.0], dtype=F64), []
    model = lambda b: b[0] * (-b[1] * T).exp() + b[2]
    for unit in (torch.ones(3, dtype=F64), units):
        y = nn.Parameter(torch.tensor([5.0, 3.0, 0.1], dtype=F64) / unit)
        optimizer = LeastSquares([y], scaling=ColumnNorms())
        losses = [float(optimizer.step(lambda y=y, unit=unit: (model(unit * y) - Y).square().sum())) for _ in range(6)]
        paths.append((losses, (unit * y).detach()))
    assert paths[0][0] == paths[1][0]
    assert torch.equal(paths[0][1], paths[1][1])


def test_cost_does_not_grow_with_the_data() -> None:
    """No pass a residual: three, for two parameters, for a check of them, and where the step ends."""
    t, w = torch.linspace(0, 1, 4000, dtype=F64), nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    optimizer = LeastSquares([w])
    for _ in range(2):
        optimizer.step(lambda: (w[0] * (-w[1] * t).exp() - t).square().sum())
    assert optimizer.last_step is not None
    assert optimizer.last_step.cost.jacobian_passes == 3


# --- what a step stands on ------------------------------------------------------------------------------------------


def start_of_rat43() -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """The first trial has a finite loss, and a gradient that is not."""
    b = nn.Parameter(SETS["Rat43"].starts[0].clone())
    return b, lambda: SETS["Rat43"](b)


def test_every_step_ends_where_the_gradient_is_finite() -> None:
    b, closure = start_of_rat43()
    optimizer = LeastSquares([b], scaling=ColumnNorms())
    for _ in range(30):
        optimizer.step(closure)
        assert optimizer.last_step is not None
        assert optimizer.last_step.outcome is not StepOutcome.NON_FINITE
        assert torch.autograd.grad(closure(), b)[0].isfinite().all()


@pytest.mark.parametrize("break_at", [0, 1, 3])
def test_resumes_bit_for_bit(break_at: int) -> None:
    (whole, first_closure), (part, second_closure) = start_of_rat43(), start_of_rat43()
    first, second = (LeastSquares([p], scaling=ColumnNorms()) for p in (whole, part))
    for _ in range(break_at):
        second.step(second_closure)
    resumed = LeastSquares([part], scaling=ColumnNorms())
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    for step in range(8):
        first.step(first_closure)
        if step >= break_at:
            resumed.step(second_closure)
    assert torch.equal(whole, part)
    assert first.cost == resumed.cost


# --- losses that do not follow the parameters -----------------------------------------------------------------------


def kept_outside(k: Tensor, a: Tensor) -> dict[str, Callable[[], Tensor]]:
    part, residuals, copied = (-k * T).exp(), a * (-k * T).exp() - Y, k.clone()
    loss = residuals.square().sum()
    cache: dict[str, Tensor] = {}

    def cached() -> Tensor:
        cache.setdefault("factor", (-k * T).exp())
        return (a * cache["factor"] - Y).square().sum()

    return {
        "a factor": lambda: (a * part - Y).square().sum(),
        "residuals": lambda: residuals.square().sum(),
        "the loss": lambda: loss,
        "a copy": lambda: (a * (-copied * T).exp() - Y).square().sum(),
        "a cache": cached,
        "values": lambda: ((k - k.detach() + 0.3) * T + (a - a.detach()) - Y).square().sum(),
    }


@pytest.mark.parametrize("which", ["a factor", "residuals", "the loss", "a copy", "a cache", "values"])
@pytest.mark.parametrize("scaled", [True, False])
def test_what_is_kept_outside_the_closure_is_refused(which: str, scaled: bool) -> None:
    k, a = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (0.3, 1.0))
    optimizer = LeastSquares([k, a], scaling=ColumnNorms() if scaled else None)
    with pytest.raises(StaleLossError, match="inside the closure"):
        optimizer.step(kept_outside(k, a)[which])
    assert (k.item(), a.item()) == (0.3, 1.0)


def test_features_of_inputs_may_be_kept() -> None:
    """A graph of the inputs alone, as for input derivatives, does not depend on the parameters."""
    x = T.clone().requires_grad_()
    features, w = torch.stack([x.sin(), x], 1), nn.Parameter(normal(2))
    optimizer = LeastSquares([w])
    before = float(optimizer.step(lambda: (features @ w - Y).square().sum()))
    assert (features @ w - Y).square().sum() < before


def test_a_copy_of_the_model_is_refused() -> None:
    model = nn.Linear(1, 1).double()
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="none of the parameters"):
        LeastSquares(model.parameters()).step(lambda: (twin(T[:, None])[:, 0] - Y).square().sum())


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (torch.inference_mode(), "inference_mode"),
        (torch.no_grad(), "without a graph"),
    ],
    ids=["inference_mode", "no_grad"],
)
def test_losses_without_residuals_say_why(wrap: Any, says: str) -> None:
    loss = wrap(lambda w: (w[0] * T + w[1] - Y).square().sum())
    w = nn.Parameter(normal(2))
    with pytest.raises(ValueError, match=says):
        LeastSquares([w]).step(lambda: loss(w))


# --- bounds ---------------------------------------------------------------------------------------------------------


def by_scipy(residuals: Callable[[Tensor], Tensor], x0: Tensor, lower: Any, upper: Any) -> tuple[Tensor, float]:
    found = scipy.optimize.least_squares(
        lambda x: residuals(torch.from_numpy(x)).numpy(),
        x0.numpy(),
        jac=lambda x: torch.func.jacfwd(residuals)(torch.from_numpy(x.copy())).numpy(),
        bounds=(lower, upper), x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15,
    )  # fmt: skip
    return torch.from_numpy(found.x), 2 * found.cost


@pytest.mark.parametrize("number", [1, 2, 6, 8, 11, 13, 14, 15, 16, 18])
def test_bounds_beside_scipy(number: int) -> None:
    """A box about the start, whose bounds hold at most of the minima."""
    function = next(f for f in FUNCTIONS if f.number == number)
    room = 0.5 * function.start.abs() + 0.1
    lower, upper = function.start - room, function.start + room
    result = fit(function, function.start, bounds=(lower, upper))
    _, expected = by_scipy(function.residuals, function.start, lower.numpy(), upper.numpy())
    assert result.success
    assert result.fun == pytest.approx(expected, rel=1e-9)
    assert ((result.x >= lower) & (result.x <= upper)).all()


@pytest.mark.parametrize("at", ["lower", "middle"])
def test_bounds_of_a_regression(at: str) -> None:
    """Starts on bounds; one bound holds at the minimum, one entry is fixed."""
    certified = SETS["Thurber"].certified
    lower, upper = 0.5 * certified, 1.5 * certified
    upper[3], lower[5] = 0.98 * certified[3], certified[5]
    upper[5] = certified[5]
    start = {"lower": lower, "middle": (lower + upper) / 2}[at]
    result = fit(SETS["Thurber"], start, bounds=[*zip(lower.tolist(), upper.tolist(), strict=True)])
    free = torch.arange(7) != 5
    whole = lambda x: torch.cat([x[:5], certified[5:6], x[5:]])
    x, value = by_scipy(
        lambda x: SETS["Thurber"].residuals(whole(x)), ((lower + upper) / 2)[free], lower[free], upper[free]
    )
    assert result.success
    assert result.x[3] == upper[3]
    assert result.x[5] == certified[5]
    assert result.fun == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(result.x, whole(x), rtol=1e-5, atol=0)


def test_start_on_bounds_that_do_not_hold() -> None:
    """All entries start on a bound, which they leave."""
    regression = SETS["Misra1a"]
    result = fit(regression, regression.starts[0], bounds=(torch.zeros(2), regression.starts[0] * torch.tensor([1, 9])))
    assert result.success
    assert regression.digits(result.x) > 7


def line(x: Tensor) -> Tensor:
    """Least at about (2, 1)."""
    return (x.reshape(-1)[0] * T + x.reshape(-1)[1] - Y).square().sum()


@pytest.mark.parametrize(
    "bounds",
    [
        scipy.optimize.Bounds([-np.inf, -1], [1.5, np.inf]),
        (torch.tensor([-torch.inf, -1.0]), torch.tensor([1.5, torch.inf])),
        (np.array([-np.inf, -1.0]), np.array([1.5, np.inf])),
        [(None, 1.5), (-1, None)],
        ((None, 1.5), (-1.0, None)),
        (-1, np.array([1.5, 9.0])),
    ],
    ids=["Bounds", "tensors", "arrays", "pairs", "tuples", "number"],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"scale": 3.0}, {"scale": torch.tensor([[7.0], [0.1]])}], ids=str)
def test_forms_of_bounds(bounds: Any, options: dict[str, Any]) -> None:
    result = fit(line, torch.zeros(2, 1, dtype=F64), bounds=bounds, **options)
    assert result.success
    assert result.x[0, 0] == 1.5
    torch.testing.assert_close(result.x[1, 0], (Y - 1.5 * T).mean())


@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda pairs: np.array(pairs, dtype=object)])
def test_bounds_as_an_array_of_pairs(kind: Any) -> None:
    pairs = [(0.0, 1.5), (-1.0, 9.0), (0.0, 0.0)]
    squares = lambda x: (x[0] * T + x[1] + x[2] * T**2 - Y).square().sum()
    result, same = (fit(squares, torch.zeros(3, dtype=F64), bounds=b) for b in (kind(pairs), pairs))
    assert torch.equal(result.x, same.x)
    one = fit(lambda x: (x * T - Y).square().sum(), torch.zeros(1, dtype=F64), bounds=kind([(0.0, 0.5)]))
    assert float(one.x) == 0.5


def test_bounds_in_single_precision() -> None:
    result = fit(lambda x: (x[0] * T.float() + x[1] - Y.float()).square().sum(), torch.zeros(2), bounds=(-5.0, 1.1))
    assert result.success
    assert result.x[0] == torch.tensor(1.1)
    assert result.x.max() <= torch.tensor(1.1)


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ([(0, 1), (2, 3)], "outside the bounds"),
        ([(1, 0), (0, 1)], "no number lies within"),
        ([(0, 1)] * 3, "one pair"),
        (torch.zeros(2), "one pair|no number|nan|outside"),
        (([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), "x0"),
        ((float("nan"), 1.0), "nan"),
        (3.0, "one pair"),
        (np.array([[0.0, 1.0], [0.0, 1.0]]), r"whose rows may be.*bounds\.tolist"),
        (torch.ones(2, 2), r"whose rows may be.*bounds\.tolist"),
    ],
)
def test_bounds_that_are_refused(bounds: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit(line, torch.full((2,), 0.5, dtype=F64), bounds=bounds)


def test_bounds_of_another_method_are_refused() -> None:
    with pytest.raises(ValueError, match="least-squares"):
        imstep.minimize(line, torch.zeros(2, dtype=F64), bounds=(0, 1))


@pytest.mark.parametrize("seed", range(4))
def test_no_unit_takes_the_function_beyond_its_bounds(seed: int) -> None:
    low, scale = normal(2, seed=seed), normal(2, seed=9 + seed).abs() + 0.1
    beyond = []

    def function(x: Tensor) -> Tensor:
        beyond.append(bool((x < low).any()))
        return (x - low + 1).log().square().sum() + (x - low + 1).square().sum()

    result = fit(function, low + 1, bounds=(low, low + 3), scale=scale)
    assert result.success
    torch.testing.assert_close(result.x, low, rtol=0, atol=1e-15)
    assert not any(beyond)
