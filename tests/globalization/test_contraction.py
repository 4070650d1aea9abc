"""Damping by the contraction of corrections."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstep.globalization import ContractionDamping

ratios = st.one_of(st.floats(0, 1e6), st.just(math.inf), st.just(math.nan))


@given(st.floats(1e-10, 1e3), st.floats(0, 1e6))
def test_changes_within_its_factors(damping: float, ratio: float) -> None:
    rule = ContractionDamping()
    assert damping / rule.shrink <= rule.after(damping, ratio) <= damping * rule.grow


@given(st.floats(1e-10, 1e3), ratios)
def test_always_grows_after_a_failure(damping: float, ratio: float) -> None:
    assert 2 * damping <= ContractionDamping().again(damping, ratio) <= 10 * damping


def test_stays_at_the_target_and_above_the_floor() -> None:
    rule = ContractionDamping(target=0.2, floor=1e-6)
    assert rule.after(1e-3, 0.2) == 1e-3
    assert rule.after(1e-6, 0.0) == 1e-6


@pytest.mark.parametrize(
    ("ratio", "decrease", "promise", "accepted"),
    [(0.2, 0.3, 1.0, True), (0.2, 0.2, 1.0, False), (0.96, 0.9, 1.0, False), (0.2, math.nan, 1.0, False),
     (0.0, 0.0, 0.0, False), (math.inf, 1.0, 1.0, False)],
)  # fmt: skip
def test_accepts(ratio: float, decrease: float, promise: float, accepted: bool) -> None:
    assert ContractionDamping().accepts(ratio, decrease, promise) is accepted


@pytest.mark.parametrize(
    "options",
    [{"initial": 0.0}, {"initial": math.inf}, {"floor": 1.0}, {"target": 0.0}, {"target": 0.96}, {"limit": 1.0},
     {"acceptance": 0.0},
     {"shrink": 0.5}, {"grow": math.inf}],
)  # fmt: skip
def test_refuses(options: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        ContractionDamping(**options)
