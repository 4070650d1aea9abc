"""Armijo, fixed steps and damping."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstep.globalization import (
    Armijo,
    FixedStep,
    LevenbergMarquardt,
    LineModel,
    NoDamping,
    Reason,
    SearchState,
    Trial,
)

MODEL = LineModel(loss=1.0, slope=-1.0, curvature=1.0, norm=1.0)


@given(trial=st.floats(-10, 10), c1=st.floats(0.01, 0.5), t=st.floats(1e-3, 1))
def test_armijo_is_the_condition_of_the_book(trial, c1, t):
    bound = 1.0 - c1 * t
    verdict = Armijo(c1=c1).judge(SearchState(), MODEL, Trial(t, trial))
    if abs(trial - bound) > 1e-12:
        assert verdict.accepted is (trial < bound)
    assert verdict.step_length == (t if verdict.accepted else t / 2)


def test_armijo_backtracks_on_rosenbrock_like_curvature():
    search, t, trials = Armijo(shrink=0.1), 1.0, []
    while True:
        verdict = search.judge(search.initial(), MODEL, Trial(t, 1.0 - t + 100 * t * t))
        trials.append(t)
        if verdict.accepted:
            break
        t = verdict.step_length
    assert trials == pytest.approx([1.0, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("search", [Armijo(), FixedStep(0.5)])
def test_the_baselines_remember_nothing_and_refuse_nan(search):
    state = SearchState(3.0, 2.0)
    t = search.propose(state, MODEL)
    verdict = search.judge(state, MODEL, Trial(t, math.nan))
    assert (verdict.accepted, verdict.reason, verdict.step_length) == (False, Reason.NON_FINITE, t / 2)
    assert verdict.state == search.reject(state, MODEL, t) == state
    assert search.initial() == SearchState()
    assert search.judge(state, MODEL, Trial(t, 0.2)).rho == pytest.approx(0.8 / MODEL.decrease(t))


def test_the_fixed_step_takes_what_comes():
    search = FixedStep(0.7)
    assert search.propose(SearchState(), MODEL) == 0.7
    assert search.judge(SearchState(), MODEL, Trial(0.7, 100.0)).accepted


@pytest.mark.parametrize(
    ("rho", "expected"),
    [
        (0.1, 2.0),
        (-math.inf, 2.0),
        (math.nan, 2.0),
        (0.25, 1.0),
        (0.5, 1.0),
        (0.75, 1.0),
        (0.8, 0.5),
        (3.0, 0.5),
    ],
)
def test_levenberg_marquardt(rho, expected):
    assert LevenbergMarquardt().update(1.0, rho) == expected


@given(rhos=st.lists(st.floats(), max_size=200), start=st.floats(1e-9, 1e6))
def test_damping_stays_within_its_bounds(rhos, start):
    rule = LevenbergMarquardt(initial=start)
    damping = rule.initial
    for rho in rhos:
        damping = rule.update(damping, rho)
        assert rule.floor <= damping <= rule.ceiling


def test_no_damping():
    assert NoDamping().initial == NoDamping().update(1.0, 0.0) == 0.0


@pytest.mark.parametrize(
    "build",
    [
        lambda: Armijo(c1=0.0),
        lambda: Armijo(shrink=1.0),
        lambda: FixedStep(0.0),
        lambda: FixedStep(math.inf),
        lambda: LevenbergMarquardt(initial=0.0),
        lambda: LevenbergMarquardt(factor=1.0),
        lambda: LevenbergMarquardt(lower=0.8),
        lambda: LevenbergMarquardt(ceiling=math.inf),
        lambda: LevenbergMarquardt(floor=0.0),
    ],
)
def test_options_out_of_range_are_refused(build):
    with pytest.raises(ValueError, match="got"):
        build()
