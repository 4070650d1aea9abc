"""Predictions of the Taylor error, and how the monitor recovers from wrong ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_cases import EXPONENTIAL
from torch import Tensor

from imstep.globalization import (
    ExactEstimate,
    LineDerivatives,
    LineModel,
    RunningEstimate,
    SearchState,
    TaylorMonitor,
    Trial,
)
from imstep.optim.trials import Line, try_steps

F64 = torch.float64
MODEL = LineModel(1.0, -1.0, 1.0, 1.0)


# --- the running estimate -------------------------------------------------------------------------------------------


def remembered(third: float, observed: float, t: float = 0.5) -> float:
    return RunningEstimate().remembered(third, LineModel(0.0, -1.0, 1.0, 1.0), t, observed * t**3 / 6)


def test_a_larger_error_is_believed_at_once_a_smaller_one_step_by_step():
    assert remembered(1.0, 50.0) == pytest.approx(50.0)
    assert remembered(8.0, 6.0) == pytest.approx(6.0)
    assert remembered(8.0, 2.5) == pytest.approx(4.0)  # half of it
    assert remembered(1e6, 1.0) == pytest.approx(1e3)  # half of its logarithm


def test_an_error_at_rounding_level_is_no_evidence():
    coarse = LineModel(1.0, -1e-4, 1e-4, norm=1e-3, unit_roundoff=2.0**-24)
    error = 5 * 2.0**-24
    assert RunningEstimate().remembered(0.0, coarse, 1.0, error) == 0.0
    assert RunningEstimate().remembered(100.0, coarse, 1.0, error) == 50.0


@pytest.mark.parametrize("third", [-1.0, math.inf, math.nan])
def test_a_start_out_of_range_is_refused(third):
    with pytest.raises(ValueError, match="got"):
        RunningEstimate(third)


# --- the exact estimate ---------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    slope=st.floats(-1e3, -1e-3),
    curvature=st.floats(-1e3, 1e3),
    second=st.floats(-1e3, 1e3),
    third=st.floats(-1e3, 1e3),
    theta=st.floats(0.01, 0.9),
)
def test_up_to_the_bound_the_cubic_is_within_theta(slope, curvature, second, third, theta):
    model = LineModel(0.0, slope, curvature, 1.0, derivatives=LineDerivatives(second, third))
    bound = ExactEstimate().within(theta, 0.0, model)
    error = lambda t: t**2 * (second - curvature) / 2 + t**3 * third / 6
    for t in (1e-3, 0.3, 0.999):
        t *= min(bound, 1e3)
        assert abs(error(t)) <= theta * model.decrease(t) + 1e-9 * (abs(error(t)) + abs(t * slope))
    if bound < 1e6:
        assert abs(error(bound)) == pytest.approx(theta * model.decrease(bound), rel=1e-6, abs=1e-9 * -bound * slope)


def test_it_knows_the_error_of_this_direction():
    x, d = 0.7, -0.4
    exact = LineDerivatives(math.exp(x) * d**2, math.exp(x) * d**3)
    model = LineModel(EXPONENTIAL.f(x), EXPONENTIAL.df(x) * d, exact.second, abs(d), derivatives=exact)
    running, monitor = TaylorMonitor(theta=0.01), TaylorMonitor(theta=0.01, error=ExactEstimate())
    right = SearchState(third_derivative=math.exp(x))
    assert monitor.needs_derivatives
    assert monitor.propose(SearchState(third_derivative=1e9), model) == pytest.approx(running.propose(right, model))
    assert monitor.initial() == SearchState()
    verdict = monitor.judge(monitor.initial(), model, Trial(0.5, EXPONENTIAL.f(x + 0.5 * d)))
    assert verdict.accepted
    assert verdict.state.third_derivative == 0.0


def test_derivatives_that_overflow_are_no_evidence():
    model = LineModel(1.0, -1.0, 1.0, 1.0, derivatives=LineDerivatives(1.0, math.inf))
    assert TaylorMonitor(error=ExactEstimate()).propose(SearchState(), model) == 1.0


def test_it_needs_the_derivatives():
    with pytest.raises(ValueError, match="derivatives"):
        TaylorMonitor(error=ExactEstimate()).propose(SearchState(), MODEL)


# --- recovery from wrong guesses --------------------------------------------------------------------------------------


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def exponentials(x: Tensor) -> Tensor:
    return (torch.exp(x) - x + torch.exp(-2 * x)).sum()


def log_cosh(x: Tensor) -> Tensor:
    return (torch.logaddexp(x, -x) * torch.arange(1, len(x) + 1)).sum()


def logistic(w: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(40, len(w), generator=generator, dtype=F64)
    y = (torch.rand(40, generator=generator) > 0.5).to(F64)
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="sum") + 1e-2 * (w @ w)


PROBLEMS = {
    "rosenbrock": (rosenbrock, torch.tensor([-1.2, 1.0] * 5, dtype=F64)),
    "exponentials": (exponentials, torch.linspace(-6, 6, 5, dtype=F64)),
    "log cosh": (log_cosh, torch.linspace(2, 9, 5, dtype=F64)),
    "logistic": (logistic, torch.full((8,), 3.0, dtype=F64)),
}


class Run:
    """Newton's method with a monitor, beside what the same monitor does at each point when it knows M."""

    def __init__(self, name: str, monitor: TaylorMonitor) -> None:
        self.f, self.x = PROBLEMS[name]
        self.monitor = monitor

    def line(self) -> tuple[Line, Tensor, float]:
        """The line along the Newton direction, of absolute eigenvalues; and |D³f[e, e, e]| by three backward passes."""
        x = self.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.f(x), x, create_graph=True)
        values, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(self.f, self.x))
        d = -vectors @ ((vectors.T @ gradient.detach()) / values.abs().clamp(min=1e-8))
        (product,) = torch.autograd.grad(gradient @ d, x, create_graph=True)
        (third,) = torch.autograd.grad(product @ d, x)
        norm = float(d.norm())
        model = LineModel(float(self.f(self.x)), float(gradient.detach() @ d), float(product.detach() @ d), norm)
        at = self.x

        def gradient_at(t: float) -> tuple[float, float]:
            y = (at + t * d).requires_grad_()
            loss = self.f(y)
            return float(loss.detach()), float(torch.autograd.grad(loss, y)[0] @ d)

        return Line(model, lambda t: float(self.f(at + t * d)), gradient_at), d, abs(float(third @ d)) / norm**3

    def deviations(self, third_factor: float, radius_factor: float | None, steps: int) -> list[float]:
        """By what factor, at least 1, each step length differs from that of a monitor that is right."""
        state, factors = None, []
        for _ in range(steps):
            line, d, third = self.line()
            right = try_steps(self.monitor, SearchState(third), line, 12)
            if state is None:
                length = right.step_length * line.model.norm
                state = SearchState(third_factor * third, math.inf if radius_factor is None else radius_factor * length)
            made = try_steps(self.monitor, state, line, 12)
            ratio = made.step_length / right.step_length if made.accepted else 0.0
            factors.append(max(ratio, 1 / ratio) if ratio > 0 else math.inf)
            state = made.state
            self.x = self.x + made.step_length * d * made.accepted
        return factors


@pytest.mark.parametrize("factor", [1e-3, 1e-2, 0.1, 10.0, 1e2, 1e3])
@pytest.mark.parametrize("name", PROBLEMS)
def test_from_wrong_guesses_it_recovers_within_three_steps(name, factor):
    """From the fourth step on, step lengths are within a factor of two of those of a monitor that started right."""
    monitor = TaylorMonitor()
    assert max(Run(name, monitor).deviations(factor, None, 6)[3:]) <= 2
    assert max(Run(name, monitor).deviations(1.0, factor, 6)[3:]) <= 2


def test_with_one_trial_a_step_they_come_right_more_slowly():
    """Without going on forward M and the radius themselves must, the radius by a factor of two a step."""
    for third, radius in ((1e3, None), (1.0, 1e-3)):
        deviations = Run("rosenbrock", TaylorMonitor(forward=1)).deviations(third, radius, 18)
        assert deviations[0] > 10
        assert max(deviations[14:]) <= 2
