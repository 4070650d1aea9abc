"""The Taylor monitor on scalar functions."""

import dataclasses
import json
import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scalar_cases import BARRIER, DOUBLE_WELL, EXPONENTIAL, LOG_COSH, Scalar, minimise

from imstep.globalization import (
    Armijo,
    LineModel,
    Reason,
    RunningEstimate,
    SearchState,
    StrongWolfe,
    TaylorMonitor,
    Trial,
    TrustRegion,
)


@pytest.mark.parametrize(
    ("problem", "starts", "minima"),
    [
        (LOG_COSH, [0.5, 2.0, -5.0, 8.0], [0.0]),
        (DOUBLE_WELL, [0.01, -0.3, 0.5, 3.0, -10.0], [-1.0, 1.0]),
        (EXPONENTIAL, [-20.0, -1.0, 5.0], [0.0]),
        (BARRIER, [1e-3, 0.5, 10.0, 1e3], [1.0]),
    ],
)
def test_newton_converges_from_starts_where_the_full_step_fails(problem, starts, minima):
    for start in starts:
        x, losses, _ = minimise(problem, start, TaylorMonitor())
        assert min(abs(x - minimum) for minimum in minima) < 1e-6
        assert all(after <= before + 1e-14 for before, after in pairwise(losses))


def test_the_observed_third_derivative_is_that_of_the_function():
    # f(x) = x³ along d = -2 from x = 1: D³f[e, e, e] = 6 with |e| = 1.
    model = LineModel(loss=1.0, slope=-6.0, curvature=24.0, norm=2.0)
    t = 0.1
    verdict = TaylorMonitor().judge(SearchState(), model, Trial(t, (1 - 2 * t) ** 3))
    assert verdict.accepted
    assert verdict.state.third_derivative == pytest.approx(6.0, rel=1e-10)


@settings(max_examples=300)
@given(
    slope=st.floats(-1e6, -1e-6),
    curvature=st.floats(-1e6, 1e6),
    norm=st.floats(1e-6, 1e6),
    third=st.floats(1e-9, 1e9),
    theta=st.floats(0.01, 0.9),
)
def test_a_proposal_bound_by_the_error_predicts_exactly_theta(slope, curvature, norm, third, theta):
    model = LineModel(0.0, slope, curvature, norm)
    t = TaylorMonitor(theta=theta).propose(SearchState(third), model)
    predicted = third * (t * norm) ** 3 / 6
    assert t > 0
    if t < model.minimizer * (1 - 1e-9):
        assert predicted == pytest.approx(theta * model.decrease(t), rel=1e-6)
    else:
        assert predicted <= theta * model.decrease(t) * (1 + 1e-6)


@settings(max_examples=200)
@given(
    slope=st.floats(-1e3, -1e-3),
    curvature=st.floats(-1e3, 1e3),
    norm=st.floats(1e-3, 1e3),
    third=st.floats(0, 1e3),
    radius=st.floats(1e-6, 1e6),
    trial=st.floats(-1e4, 1e4) | st.sampled_from([math.nan, math.inf]),
)
def test_invariants_of_every_verdict(slope, curvature, norm, third, radius, trial):
    monitor, state = TaylorMonitor(), SearchState(third, radius)
    model = LineModel(1.0, slope, curvature, norm)
    t = monitor.propose(state, model)
    assert 0 < t * norm <= radius * (1 + 1e-12)
    assert t <= model.minimizer
    verdict = monitor.judge(state, model, Trial(t, trial))
    if verdict.accepted:
        assert trial < 1.0
        assert verdict.step_length == t
        assert verdict.reason is Reason.ACCEPTED
    else:
        assert t / 10 <= verdict.step_length * (1 + 1e-12)
        assert verdict.step_length <= t / 2
        assert verdict.state == state
    rejected = monitor.reject(state, model, t)
    assert 0 < rejected.radius < radius
    for remembered in (verdict.state, rejected):
        assert math.isfinite(remembered.third_derivative)
        assert math.isfinite(remembered.radius)
        assert SearchState(**json.loads(json.dumps(dataclasses.asdict(remembered)))) == remembered


def test_a_trial_that_is_not_finite_is_shortened_and_leaves_no_evidence():
    monitor, model = TaylorMonitor(), LineModel(1.0, -1.0, 1.0, 1.0)
    for trial in (math.nan, math.inf):
        verdict = monitor.judge(SearchState(), model, Trial(1.0, trial))
        assert (verdict.accepted, verdict.reason, verdict.step_length) == (False, Reason.NON_FINITE, 0.1)
        assert verdict.rho == -math.inf
        assert verdict.state == SearchState()


def test_without_evidence_it_takes_the_whole_step():
    monitor = TaylorMonitor()
    assert monitor.initial() == SearchState(0.0, math.inf)
    assert monitor.propose(monitor.initial(), LineModel(0.0, -2.0, 4.0, 3.0)) == 0.5
    assert monitor.propose(monitor.initial(), LineModel(0.0, -2.0, -4.0, 3.0)) == 0.5
    assert monitor.propose(monitor.initial(), LineModel(0.0, -2.0, 0.0, 3.0)) == 1.0


def test_given_evidence_is_used():
    monitor = TaylorMonitor(radius=0.3, error=RunningEstimate(2.0))
    assert monitor.initial() == SearchState(2.0, 0.3)
    assert monitor.propose(monitor.initial(), LineModel(0.0, -100.0, 1.0, 3.0)) == pytest.approx(0.1)


def test_the_radius_follows_rho():
    monitor, state = TaylorMonitor(), SearchState(radius=1.0)
    model = LineModel(loss=10.0, slope=-1.0, curvature=0.0, norm=2.0)
    at_bound, inside = 0.5, 0.25

    def after(t, rho):
        return monitor.judge(state, model, Trial(t, 10.0 - rho * model.decrease(t))).state.radius

    assert after(at_bound, 0.9) == 2.0
    assert after(inside, 0.9) == 1.0
    assert after(at_bound, 0.5) == 1.0
    assert after(4 * at_bound, 0.9) == 8.0  # gone beyond the bound
    assert after(4 * at_bound, 0.5) == 4.0
    assert after(inside, 0.2) == 0.25
    assert monitor.reject(state, model, inside).radius == 0.25


def test_an_error_at_rounding_level_is_no_evidence():
    u = 2.0**-24
    model = LineModel(1.0, -1e-4, 1e-4, norm=1e-3, unit_roundoff=u)
    verdict = TaylorMonitor().judge(SearchState(), model, Trial(1.0, model.value(1.0) + 5 * u))
    assert verdict.accepted
    assert verdict.state.third_derivative == 0.0


def test_losses_that_agree_to_rounding_are_judged_by_gradient():
    # f(x) = 1e8 + x²: at x = 1e-5 the loss cannot see a Newton step, the slope can.
    model = LineModel(loss=1e8, slope=-2e-10, curvature=2e-10, norm=1e-5)
    judge = lambda slope: TaylorMonitor().judge(SearchState(), model, Trial(1.0, 1e8, slope))
    assert judge(0.0).accepted
    assert judge(0.0).rho == pytest.approx(1.0)
    assert not judge(4e-10).accepted
    assert judge(math.nan).reason is Reason.NON_FINITE


def test_losses_worth_few_digits_are_judged_by_gradient():
    # A sum of cancelling terms: thousands of units in the last place are rounding.
    model = LineModel(loss=1.0, slope=-2e-14, curvature=2e-14, norm=1.0)
    noisy = 1.0 + 1e4 * 2.0**-53
    assert TaylorMonitor().judge(SearchState(), model, Trial(1.0, noisy, 0.0)).rho == pytest.approx(1.0)
    assert not TaylorMonitor().judge(SearchState(), model, Trial(1.0, noisy, 6e-14)).accepted
    assert not TaylorMonitor().judge(SearchState(), model, Trial(1.0, 1.0 + 1e-9, 0.0)).accepted  # a rise beyond doubt


def test_no_step_is_lengthened_on_what_may_be_rounding():
    rippled = Scalar(lambda x: 1e3 + x * x - 1e-10 * (x < 8.5e-8), lambda x: 2 * x, lambda x: 20.0)
    made = rippled.step(TaylorMonitor(), 1e-7, -1e-7)
    assert made.accepted
    assert made.step_length == pytest.approx(0.1)  # the model's minimiser


def test_newton_gets_through_the_rounding_level_of_the_loss():
    shifted = Scalar(lambda x: 1e6 + EXPONENTIAL.f(x), EXPONENTIAL.df, EXPONENTIAL.ddf)
    x, _, _ = minimise(shifted, 2.0, TaylorMonitor(), tolerance=1e-14)
    assert abs(x) < 1e-13


def test_a_promise_of_nothing_is_not_accepted():
    verdict = TaylorMonitor().judge(SearchState(), LineModel(1.0, -1.0, 1.0, 1.0), Trial(3.0, 0.5))  # beyond 2 |s|/k
    assert math.isnan(verdict.rho)
    assert not verdict.accepted


def test_a_direction_of_ascent_is_refused():
    for search in (TaylorMonitor(), Armijo(), StrongWolfe(), TrustRegion()):
        with pytest.raises(ValueError, match="negative gradient"):
            search.propose(search.initial(), LineModel(0.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "options",
    [{"theta": 0.0}, {"theta": 1.0}, {"acceptance": -0.1}, {"acceptance": 1.0}, {"radius": 0.0}, {"forward": 0.5}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        TaylorMonitor(**options)


@settings(max_examples=100)
@given(
    exponent=st.floats(-100, 100),
    slope=st.floats(-10, -0.1),
    curvature=st.floats(-10, 10),
    third=st.floats(0, 10),
)
def test_the_step_does_not_depend_on_the_length_of_the_direction(exponent, slope, curvature, third):
    scale = 10.0**exponent
    assume(curvature == 0 or abs(curvature) > 1e-3)
    state, monitor = SearchState(third, radius=3.0), TaylorMonitor()
    plain = monitor.propose(state, LineModel(0.0, slope, curvature, 1.0))
    scaled = monitor.propose(state, LineModel(0.0, slope * scale, curvature * scale**2, scale))
    assert scaled * scale == pytest.approx(plain, rel=1e-9)
