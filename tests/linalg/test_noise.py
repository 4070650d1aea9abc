"""How often the noise test disturbs: its formula against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from imstep.linalg import NoiseTest

DRAWS = 200_000
SIGNALS = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)


@pytest.mark.parametrize("z", [0.3, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("signal", SIGNALS)
def test_the_rate_is_that_of_simulated_halves(z: float, signal: float) -> None:
    generator = np.random.default_rng(0)
    spread = 3.0  # of a half's curvature; δ = √2 μ/σ
    first, second = generator.normal(signal * spread / math.sqrt(2), spread, (2, DRAWS))
    test = NoiseTest(z=z)
    seen = np.mean([test.disturbs(a, b) for a, b in zip(first[:20_000], second[:20_000], strict=True)])
    # All draws by the words of the definition: the mean is within z standard errors of zero.
    mean, error = (first + second) / 2, np.std([first, second], axis=0, ddof=1) / math.sqrt(2)
    assert test.rate(signal) == pytest.approx(np.mean(mean <= z * error), abs=4 * 0.5 / math.sqrt(DRAWS))
    assert test.rate(signal) == pytest.approx(seen, abs=4 * 0.5 / math.sqrt(20_000))


@given(z=st.floats(0.01, 10), signal=st.floats(-10, 30))
@settings(deadline=None)
def test_the_rate_is_owens_formula(z: float, signal: float) -> None:
    h = signal / math.hypot(1, z)
    expected = special.ndtr(-h) + 2 * special.owens_t(h, z)
    assert NoiseTest(z=z).rate(signal) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("z", [0.5, 1.0, 2.0, 6.314])
def test_without_curvature_trust_has_the_tail_of_students_t_with_one_degree_of_freedom(z: float) -> None:
    assert 1 - NoiseTest(z=z).rate(0.0) == pytest.approx(stats.t(1).sf(z), rel=1e-10)


def test_with_z_1_it_takes_two_positive_halves() -> None:
    for signal in SIGNALS:
        assert NoiseTest(z=1.0).rate(signal) == pytest.approx(1 - special.ndtr(signal / math.sqrt(2)) ** 2, abs=1e-12)
    assert not NoiseTest(z=1.0).disturbs(1e-9, 1.0)
    assert NoiseTest(z=1.0).disturbs(0.0, 1.0)
    assert NoiseTest(z=2.0).disturbs(1.0, 3.0)
    assert not NoiseTest(z=2.0).disturbs(1.0, 2.9)
