"""The strong Wolfe search on scalar functions: both conditions hold where it stops."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_cases import BARRIER, DOUBLE_WELL, EXPONENTIAL, LOG_COSH, MORE_THUENTE, Scalar, minimise

from imstep.globalization import LineModel, Reason, SearchState, StrongWolfe, Trial

CONSTANTS = {"1": (1e-3, 0.1), "2": (0.099, 0.1), "3": (0.099, 0.1)} | dict.fromkeys("456", (9.9e-4, 1e-3))


def certify(problem: Scalar, x: float, d: float, t: float, c1: float, c2: float) -> None:
    """The conditions themselves, of the book's (3.7), from the function alone."""
    slope = problem.df(x) * d
    assert problem.f(x + t * d) <= problem.f(x) + c1 * t * slope
    assert abs(problem.df(x + t * d) * d) <= c2 * abs(slope)


@pytest.mark.parametrize("first", [1e-3, 0.1, 10.0, 1e3])
@pytest.mark.parametrize("name", MORE_THUENTE)
def test_the_functions_of_more_and_thuente(name, first):
    """From the starts of the paper, with its constants and with those for Newton methods."""
    problem = MORE_THUENTE[name]
    for c1, c2 in (CONSTANTS[name], (1e-4, 0.9)):
        made = problem.step(StrongWolfe(c1, c2), 0.0, first, limit=15)
        assert made.accepted
        certify(problem, 0.0, first, made.step_length, c1, c2)
        assert made.cost.gradients == made.count
        assert made.cost.losses == 0
        assert made.state == SearchState()


@settings(max_examples=300)
@given(
    x=st.floats(-4, 4),
    scale=st.floats(1e-3, 1e3),
    c2=st.floats(0.05, 0.95),
    problem=st.sampled_from([LOG_COSH, DOUBLE_WELL, EXPONENTIAL]),
)
def test_both_conditions_hold_wherever_it_starts(x, scale, c2, problem):
    d = -math.copysign(scale, problem.df(x))
    if abs(problem.df(x)) < 1e-3:
        return
    made = problem.step(StrongWolfe(c2=c2), x, d, limit=40)
    assert made.accepted
    certify(problem, x, d, made.step_length, 1e-4, c2)


def test_a_good_first_trial_is_taken():
    made = Scalar(lambda x: x * x, lambda x: 2 * x).step(StrongWolfe(), 1.0, -1.0)
    assert (made.step_length, made.count) == (1.0, 1)


def test_the_minimiser_of_a_cubic_is_interpolated_exactly():
    cubic = Scalar(lambda x: x**3 - 3 * x, lambda x: 3 * x * x - 3)  # its minimiser is 1
    verdict = StrongWolfe(c2=0.1).judge(SearchState(), cubic.model(0.0, 4.0), cubic.trial(0.0, 4.0, 1.0))
    assert verdict.reason is Reason.INSUFFICIENT_DECREASE
    assert verdict.step_length == pytest.approx(0.25, rel=1e-14)
    longer = StrongWolfe(c2=0.1).judge(SearchState(), cubic.model(0.0, 0.25), cubic.trial(0.0, 0.25, 1.0))
    assert longer.reason is Reason.STEEP
    assert longer.step_length == pytest.approx(4.0, rel=1e-14)


def test_trials_lengthen_until_they_bracket():
    far = Scalar(lambda x: math.sqrt(1 + (x - 1e4) ** 2), lambda x: (x - 1e4) / math.sqrt(1 + (x - 1e4) ** 2))
    made = far.step(StrongWolfe(), 0.0, 1.0, limit=25)
    assert made.accepted
    certify(far, 0.0, 1.0, made.step_length, 1e-4, 0.9)


@pytest.mark.parametrize("outside", [math.nan, math.inf])
def test_a_trial_that_is_not_finite_closes_the_bracket(outside):
    wall = Scalar(
        lambda x: (x - 0.02) ** 2 if x < 0.5 else outside, lambda x: 2 * (x - 0.02) if x < 0.5 else outside
    )
    verdict = StrongWolfe().judge(SearchState(), wall.model(0.0), Trial(1.0, outside, outside))
    assert (verdict.accepted, verdict.reason, verdict.step_length) == (False, Reason.NON_FINITE, pytest.approx(0.1))
    assert verdict.rho == -math.inf
    made = wall.step(StrongWolfe(), 0.0)
    assert made.accepted
    certify(wall, 0.0, 1.0, made.step_length, 1e-4, 0.9)


def test_a_kink_has_no_acceptable_trial_but_one_that_will_do():
    kink = Scalar(lambda x: abs(x - 0.3), lambda x: math.copysign(1, x - 0.3))  # |slope| is 1 everywhere
    made = kink.step(StrongWolfe(), 0.0, 1.0, limit=10)
    assert made.accepted
    assert made.count == 10
    assert made.loss == kink.f(made.step_length) < 0.3 - 1e-4 * made.step_length
    assert abs(made.step_length - 0.3) < 0.1
    assert made.state == SearchState()


def test_without_any_decrease_the_step_is_given_up():
    up = Scalar(lambda x: abs(x), lambda x: -1.0 if x <= 0 else 1.0)
    made = up.step(StrongWolfe(), 0.0, 1.0, SearchState(2.0, 3.0), limit=7)
    assert (made.accepted, made.count, made.loss) == (False, 7, 0.0)
    assert made.state == SearchState(2.0, 3.0)


def test_what_other_searches_remember_is_kept():
    made = EXPONENTIAL.step(StrongWolfe(), -3.0, 30.0, SearchState(2.0, 3.0))
    assert made.accepted
    assert made.count > 1
    assert made.state == SearchState(2.0, 3.0)


def test_at_rounding_level_the_slopes_decide():
    shifted = Scalar(lambda x: 1e8 + x * x, lambda x: 2 * x, lambda x: 2.0)
    made = shifted.step(StrongWolfe(c2=0.1), 1e-5, -1e-5)
    assert (made.accepted, made.step_length) == (True, 1.0)
    too_far = shifted.step(StrongWolfe(c2=0.1), 1e-5, -3e-5)
    assert too_far.accepted
    assert too_far.step_length == pytest.approx(1 / 3, abs=0.05)


def test_newton_with_it_converges():
    for problem, start, minimum in ((LOG_COSH, 5.0, 0.0), (DOUBLE_WELL, 0.01, 1.0), (BARRIER, 10.0, 1.0)):
        x, losses, _ = minimise(problem, start, StrongWolfe())
        assert abs(x - minimum) < 1e-6
        assert all(after <= before + 1e-14 for before, after in pairwise(losses))


def test_the_slope_is_required():
    with pytest.raises(ValueError, match="Evaluate the gradient"):
        StrongWolfe().judge(SearchState(), LineModel(1.0, -1.0, 0.0, 1.0), Trial(1.0, 0.5))


@pytest.mark.parametrize("options", [{"c1": 0.0}, {"c1": 0.95}, {"c2": 1.0}, {"lengthen": 1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        StrongWolfe(**options)
