import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstep.globalization import LineModel

numbers = st.floats(-1e6, 1e6)


@given(loss=numbers, slope=numbers, curvature=numbers, t=st.floats(0, 1e3))
def test_value_and_decrease_are_the_quadratic(loss, slope, curvature, t):
    model = LineModel(loss, slope, curvature, norm=2.0)
    assert model.decrease(t) == pytest.approx(-t * slope - t * t * curvature / 2, rel=1e-9, abs=1e-3)
    assert model.value(t) + model.decrease(t) == pytest.approx(loss, rel=1e-9, abs=1e-2)


def test_the_minimiser():
    assert LineModel(1.0, -3.0, 2.0, 1.0).minimizer == 1.5
    assert LineModel(1.0, -3.0, 0.0, 1.0).minimizer == math.inf
    assert LineModel(1.0, -3.0, -2.0, 1.0).minimizer == math.inf
    assert LineModel(1.0, 3.0, 2.0, 1.0).minimizer == 0.0


def test_a_small_decrease_of_a_large_loss_is_not_cancelled():
    model = LineModel(loss=1e16, slope=-1e-3, curvature=0.0, norm=1.0)
    assert model.decrease(1.0) == 1e-3
    assert model.error_by_loss(1.0, trial_loss=1e16) == 1e-3


def test_both_errors_of_a_cubic_are_exact():
    # f(t) = 2 - 3 t + 4 t²/2 + 5 t³, so E(t) = 5 t³ and E'(t) = 15 t².
    model = LineModel(2.0, -3.0, 4.0, norm=1.0)
    for t in (0.1, 0.5, 2.0):
        loss = 2 - 3 * t + 2 * t**2 + 5 * t**3
        slope = -3 + 4 * t + 15 * t**2
        assert model.error_by_loss(t, loss) == pytest.approx(5 * t**3, rel=1e-12)
        assert model.error_by_gradient(t, slope) == pytest.approx(5 * t**3, rel=1e-12)


@pytest.mark.parametrize(
    "numbers",
    [(math.nan, -1, 1, 1), (0, -math.inf, 1, 1), (0, -1, math.nan, 1), (0, -1, 1, 0), (0, -1, 1, math.inf)],
)
def test_numbers_that_are_not_finite_are_refused(numbers):
    with pytest.raises(ValueError, match="Refuse the step"):
        LineModel(*numbers)
