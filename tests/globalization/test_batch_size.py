"""The norm test on numbers."""

from __future__ import annotations

import math

import pytest

from imstep.globalization import NormTest


def test_a_batch_that_passes_keeps_its_size_and_another_one_would_just_pass() -> None:
    test = NormTest(theta=0.5, growth=4.0)
    assert test.size(100, variance=0.25, squared_norm=1.0) == 100
    grown = test.size(100, variance=0.6, squared_norm=1.0)
    assert grown == 240
    assert 0.6 * 100 / grown <= 0.25 < 0.6 * 100 / (grown - 1)


def test_growth_is_bounded_also_where_the_gradient_vanishes() -> None:
    for squared_norm in (1e-9, 0.0):
        assert NormTest(growth=1.5).size(10, variance=1.0, squared_norm=squared_norm) == 15
    assert NormTest().size(10, variance=0.0, squared_norm=0.0) == 10
    assert NormTest().size(10, variance=math.nan, squared_norm=1.0) == 10


@pytest.mark.parametrize("options", [{"theta": 0.0}, {"growth": 1.0}, {"growth": math.inf}, {"theta": math.nan}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        NormTest(**options)
