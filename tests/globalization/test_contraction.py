"""Damping by the contraction of corrections."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from imstep import LeastSquares
from imstep.globalization import ContractionDamping

ratios = st.one_of(st.floats(0, 1e6), st.just(math.inf), st.just(math.nan))


@given(st.floats(1e-10, 1e3), st.floats(0, 1e6), st.booleans(), st.floats(1, 10))
def test_changes_within_its_factors(damping: float, ratio: float, again: bool, less: float) -> None:
    rule = ContractionDamping(shrink_again=less)
    least = damping / (less if again else rule.shrink)
    assert least <= rule.after(damping, ratio, again) <= damping * rule.grow


@given(st.floats(1e-10, 1e3), ratios)
def test_always_grows_after_a_failure(damping: float, ratio: float) -> None:
    assert 2 * damping <= ContractionDamping().again(damping, ratio) <= 10 * damping


def test_stays_at_the_target_and_above_the_floor() -> None:
    rule = ContractionDamping(target=0.2, floor=1e-6)
    assert rule.after(1e-3, 0.2) == 1e-3
    assert rule.after(1e-6, 0.0) == 1e-6


@pytest.mark.filterwarnings("ignore:.*not recognised")
def test_waits_after_a_step_that_was_tried_again() -> None:
    calls = []

    class Watched(ContractionDamping):
        def again(self, damping: float, ratio: float) -> float:
            calls.append("again")
            return super().again(damping, ratio)

        def after(self, damping: float, ratio: float, again: bool = False) -> float:
            calls.append("waits" if again else "falls")
            return super().after(damping, ratio, again)

    w = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = LeastSquares([w], damping=Watched(initial=1e-10), corrections=1)
    for _ in range(10):
        optimizer.step(lambda: torch.stack([10 * (w[1] - w[0] ** 2), 1 - w[0]]).square().sum())
    ends = [(before == "again", call) for before, call in pairwise(["", *calls]) if call != "again"]
    assert {(True, "waits"), (False, "falls")} == set(ends)


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
     {"shrink": 0.5}, {"grow": math.inf}, {"shrink_again": 0.9}],
)  # fmt: skip
def test_refuses(options: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        ContractionDamping(**options)
