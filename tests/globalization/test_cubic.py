"""Adaptive cubic regularisation: where its steps end, and how σ follows them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scalar_cases import BARRIER, DOUBLE_WELL, EXPONENTIAL, LOG_COSH, minimise

from imstep.globalization import AdaptiveCubic, LineModel, Reason, SearchState, Trial

MODEL = LineModel(loss=10.0, slope=-2.0, curvature=1.0, norm=2.0)


@given(st.floats(1e-3, 1e3), st.floats(-10, 10), st.floats(0.1, 10))
def test_the_proposal_is_the_minimiser_of_the_cubic_model(sigma, curvature, norm):
    model = LineModel(loss=1.0, slope=-2.0, curvature=curvature, norm=norm)
    t = AdaptiveCubic().propose(SearchState(third_derivative=2 * sigma), model)
    slope = model.slope + t * curvature + sigma * norm**3 * t**2
    assert slope == pytest.approx(0.0, abs=1e-9 * (2 + t * abs(curvature)))


def judged(rho, sigma=0.1, t=1.0):
    promised = MODEL.decrease(t) - sigma * (t * MODEL.norm) ** 3 / 3
    verdict = AdaptiveCubic().judge(
        SearchState(third_derivative=2 * sigma), MODEL, Trial(t, MODEL.loss - rho * promised)
    )
    return verdict, verdict.state.third_derivative / 2


def test_sigma_follows_the_ratio():
    for rho, accepted, factor in ((1.0, True, 0.5), (0.5, True, 1.0), (0.2, True, 1.0)):
        verdict, sigma = judged(rho)
        assert (verdict.accepted, verdict.rho) == (accepted, pytest.approx(rho))
        assert sigma == pytest.approx(0.1 * factor)
    verdict, sigma = judged(-1.0)
    assert (verdict.accepted, verdict.reason) == (False, Reason.INSUFFICIENT_DECREASE)
    assert sigma == pytest.approx(max(0.2, 3 * verdict.taylor_error / 8))
    assert 0.1 <= verdict.step_length <= 0.5


def test_what_is_not_finite_is_cut_to_a_tenth():
    verdict, sigma = judged(math.nan)
    assert (verdict.accepted, verdict.reason, verdict.step_length) == (False, Reason.NON_FINITE, 0.1)
    state = SearchState(third_derivative=2 * sigma)
    assert AdaptiveCubic().propose(state, MODEL) == pytest.approx(0.1)


@pytest.mark.parametrize("norm", [1e-95, 1e105, 1e200])
@pytest.mark.parametrize("loss", [9.0, 9.4, 12.0, math.inf])
def test_the_unit_of_the_step_does_not_matter(loss, norm):
    """Its cube may leave the range of numbers."""
    model = LineModel(loss=MODEL.loss, slope=MODEL.slope, curvature=MODEL.curvature, norm=norm)
    search, trial = AdaptiveCubic(), Trial(1.0, loss)
    found, expected = search.judge(SearchState(), model, trial), search.judge(SearchState(), MODEL, trial)
    assert (found.accepted, found.reason) == (expected.accepted, expected.reason)
    if norm < 1:  # else sigma is below all numbers
        sigma = found.state.third_derivative * norm * norm * norm
        assert sigma == pytest.approx(expected.state.third_derivative * MODEL.norm**3)


def test_a_step_given_up_raises_sigma():
    assert AdaptiveCubic().reject(SearchState(third_derivative=2.0), MODEL, 1.0).third_derivative == 4.0


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize(
    ("problem", "starts", "minima"),
    [
        (LOG_COSH, [0.5, 2.0, -5.0], [0.0]),
        (DOUBLE_WELL, [0.5, -10.0], [-1.0, 1.0]),
        (EXPONENTIAL, [-1.0, 5.0], [0.0]),
        (BARRIER, [0.5, 10.0], [1.0]),
    ],
)
def test_it_finds_minima(problem, starts, minima, sigma):
    for start in starts:
        x, _, _ = minimise(problem, start, AdaptiveCubic(sigma=sigma))
        assert min(abs(x - m) for m in minima) < 1e-6


@pytest.mark.parametrize("options", [{"sigma": -1.0}, {"acceptance": 0.0}, {"success": 1.0}, {"factor": 1.0}])
def test_arguments_are_checked(options):
    with pytest.raises(ValueError, match="got"):
        AdaptiveCubic(**options)
