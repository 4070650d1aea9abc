"""The trust region: the radius rule of the book, and backtracking within it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scalar_cases import BARRIER, DOUBLE_WELL, EXPONENTIAL, LOG_COSH, Scalar, minimise

from imstep.globalization import LineModel, Reason, SearchState, Trial, TrustRegion

MODEL = LineModel(loss=10.0, slope=-2.0, curvature=1.0, norm=2.0)


def after(radius: float, t: float, rho: float) -> float:
    trial = Trial(t, MODEL.loss - rho * MODEL.decrease(t))
    return TrustRegion().judge(SearchState(radius=radius), MODEL, trial).state.radius


def test_the_proposal_is_the_direction_within_the_radius():
    propose = lambda radius: TrustRegion().propose(SearchState(radius=radius), MODEL)
    assert (propose(1.0), propose(2.0), propose(5.0), propose(math.inf)) == (0.5, 1.0, 1.0, 1.0)


def test_the_radius_rule_of_the_book():
    assert after(1.0, 0.5, rho=0.9) == 2.0  # at the bound, good
    assert after(1.0, 0.5, rho=0.5) == 1.0
    assert after(1.0, 0.5, rho=0.1) == 0.25
    assert after(5.0, 1.0, rho=0.9) == 5.0  # inside
    assert after(5.0, 1.0, rho=0.1) == 0.5


def test_the_first_step_sets_an_infinite_radius():
    assert (after(math.inf, 1.0, 0.9), after(math.inf, 1.0, 0.5), after(math.inf, 1.0, 0.1)) == (4.0, 2.0, 0.5)


def test_after_backtracking_the_radius_is_the_length_of_the_step():
    assert after(1.0, 0.2, rho=1.0) == 0.4
    assert after(1.0, 0.2, rho=0.1) == 0.4


def test_the_radius_is_bounded():
    search = TrustRegion(largest=1.5)
    assert search.initial().radius == 1.5
    trial = Trial(0.5, MODEL.value(0.5))
    assert search.judge(SearchState(radius=1.0), MODEL, trial).state.radius == 1.5


@given(rise=st.floats(0.0, 1e6), t=st.floats(0.01, 1.0))
def test_backtracking_goes_to_the_minimiser_of_the_interpolating_parabola(rise, t):
    verdict = TrustRegion().judge(SearchState(radius=2 * t), MODEL, Trial(t, MODEL.loss + rise))
    assert (verdict.accepted, verdict.reason) == (False, Reason.INSUFFICIENT_DECREASE)
    bend = 2 * (rise - t * MODEL.slope) / t**2  # of p(0) = f, p'(0) = s, p(t) = f + rise
    assert verdict.step_length == pytest.approx(max(-MODEL.slope / bend, t / 10), rel=1e-12)
    assert t / 10 <= verdict.step_length <= t / 2 * (1 + 1e-12)


def test_what_is_not_finite_is_cut_to_a_tenth():
    for loss in (math.nan, math.inf):
        verdict = TrustRegion().judge(SearchState(radius=2.0), MODEL, Trial(1.0, loss))
        assert (verdict.accepted, verdict.reason, verdict.step_length) == (False, Reason.NON_FINITE, 0.1)


def test_a_step_given_up_leaves_a_quarter_of_what_was_tried():
    up = Scalar(lambda x: abs(x), lambda x: -1.0 if x <= 0 else 1.0)
    made = up.step(TrustRegion(radius=2.0), 0.0, limit=3)
    assert (made.accepted, made.count, made.state.radius) == (False, 3, 0.25)


@pytest.mark.parametrize("radius", [1e-4, 1.0, math.inf])
@pytest.mark.parametrize(
    ("problem", "starts", "minima"),
    [
        (LOG_COSH, [0.5, 2.0, -5.0, 8.0], [0.0]),
        (DOUBLE_WELL, [0.01, 0.5, -10.0], [-1.0, 1.0]),
        (EXPONENTIAL, [-20.0, -1.0, 5.0], [0.0]),
        (BARRIER, [1e-3, 0.5, 10.0], [1.0]),
    ],
)
def test_newton_within_it_converges(problem, starts, minima, radius):
    for start in starts:
        x, losses, _ = minimise(problem, start, TrustRegion(radius))
        assert min(abs(x - minimum) for minimum in minima) < 1e-6
        assert all(after <= before + 1e-14 for before, after in pairwise(losses))


@pytest.mark.parametrize("options", [{"radius": 0.0}, {"largest": -1.0}, {"acceptance": 0.25}, {"acceptance": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        TrustRegion(**options)
