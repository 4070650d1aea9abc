import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstep.globalization import LineModel, Trial

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
    assert model.taylor_error(Trial(1.0, loss=1e16)) == 1e-3


@pytest.mark.parametrize("lacking", [2, 3], ids=("quadratic", "cubic"))
def test_the_error_is_exact_where_losses_say_it_and_bounded_by_slopes_where_they_do_not(lacking):
    # f(t) = c - 3 t + 4 t²/2 + E(t) with E(t) = 5 t² or 5 t³, as Gauss-Newton's curvature and a Hessian have it.
    for constant in (2.0, 1e17):  # the losses of the second agree to rounding
        model = LineModel(constant, -3.0, 4.0, norm=1.0)
        for t in (0.1, 0.5, 2.0):
            error = 5 * t**lacking
            change = -3 * t + 2 * t**2 + error
            trial = Trial(t, constant + change, slope=-3 + 4 * t + lacking * error / t)
            assert model.rounding_level(trial) is (constant == 1e17)
            found = model.taylor_error(trial)
            if constant == 2:
                assert found == pytest.approx(error, rel=1e-12)
            else:
                assert (1 - 1e-14) * error * lacking / 3 <= found <= (1 + 1e-14) * error * lacking / 2
            assert model.change(trial) == pytest.approx(change + found - error, rel=1e-12, abs=1e-14)


def test_losses_that_differ_little_and_truly_are_believed():
    # E(t) = 0.65e-6 t², which the losses resolve. As of third order, E'(1) / 3, it would look like a decrease.
    model = LineModel(1e5, -1e-6, 1e-6, norm=1.0)
    trial = Trial(1.0, 1e5 + 1.5e-7, slope=1.3e-6)
    assert model.rounding_level(trial)
    assert model.change(trial) == pytest.approx(1.5e-7, rel=1e-3)
    assert math.isnan(model.taylor_error(Trial(1.0, 1e5, slope=math.nan)))


def test_the_rounding_level_is_that_of_what_is_expected_too():
    model = LineModel(loss=1.0, slope=-2.0, curvature=2.0, norm=1.0)
    assert not model.rounding_level(Trial(2.0, 1.0, slope=2.0))  # the other side of the valley
    assert model.taylor_error(Trial(2.0, 1.0, slope=2.0)) == 0.0
    short = 1e-15
    assert model.rounding_level(Trial(short, 1.0))
    assert not model.rounding_level(Trial(short, 1.0 + 1e-9))
    assert not model.rounding_level(Trial(short, math.nan))


@pytest.mark.parametrize(
    "numbers",
    [(math.nan, -1, 1, 1), (0, -math.inf, 1, 1), (0, -1, math.nan, 1), (0, -1, 1, 0), (0, -1, 1, math.inf)],
)
def test_numbers_that_are_not_finite_are_refused(numbers):
    with pytest.raises(ValueError, match="Refuse the step"):
        LineModel(*numbers)
