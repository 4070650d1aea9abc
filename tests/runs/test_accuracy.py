"""The sweep over h: its arithmetic against closed forms, and the plateau that the complex step promises."""

from __future__ import annotations

import json
import math

import pytest
import torch

from imstep.runs.accuracy import METHODS, measure, measure_accuracy, plateau, steps_of
from imstep.runs.accuracy_report import save_accuracy
from imstep.runs.subjects import NETWORKS, Subject


def quartic(dtype: torch.dtype):
    """f(x) = sum x⁴, whose Hessian is 12 diag(x²)."""
    return lambda x: (x**4).sum()


SUBJECT = Subject(quartic, torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([1.0, 3.0, -1.0]).double())


def test_reference_is_the_closed_form() -> None:
    expected = 12 * SUBJECT.point**2 * SUBJECT.direction
    torch.testing.assert_close(SUBJECT.reference(), expected, rtol=1e-15, atol=0)


def test_forward_difference_has_order_one_and_central_order_two() -> None:
    steps = (1e-2, 1e-3)
    for method, order in (("forward difference", 1), ("central difference", 2)):
        coarse, fine = measure(SUBJECT, METHODS[method], "float64", steps)
        assert coarse is not None
        assert fine is not None
        assert math.log10(coarse / fine) == pytest.approx(order, abs=0.05)


def test_differences_lose_everything_when_h_is_below_rounding() -> None:
    errors = measure(SUBJECT, METHODS["central difference"], "float64", (1e-30,))
    assert errors == (pytest.approx(1.0),)


def test_overflow_is_recorded_as_none() -> None:
    assert measure(SUBJECT, lambda f, x, v, h: v / 0.0, "float64", (1e-3,)) == (None,)


def test_steps_reach_the_smallest_of_each_precision() -> None:
    for dtype, smallest in (("float64", 1e-300), ("float32", 1e-38)):
        steps = steps_of(dtype)
        assert steps[0] == pytest.approx(1e-1)
        assert steps[-1] == pytest.approx(smallest)
        assert list(steps) == sorted(steps, reverse=True)


def test_plateau_is_the_longest_run_in_decades() -> None:
    steps = [1e-1, 1e-2, 1e-3, 1e-4, 1e-9]
    found = plateau(steps, [0.0, 0.0, 1.0, 1e-9, 1e-8], 1e-8)
    assert found is not None
    assert (found.largest_h, found.smallest_h, found.worst_error) == (1e-4, 1e-9, 1e-8)
    assert found.decades == pytest.approx(5)
    assert plateau(steps, [1.0] * 5, 1e-8) is None


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_point_and_direction_are_exact_in_float32(network) -> None:
    subject = network.subject(3)
    for tensor in (subject.point, subject.direction):
        torch.testing.assert_close(tensor.float().double(), tensor, rtol=0, atol=0)


def test_complex_step_is_flat_and_differences_are_not(tmp_path, monkeypatch) -> None:
    every_other = lambda dtype: (*steps_of(dtype)[:-1:2], steps_of(dtype)[-1])
    monkeypatch.setattr("imstep.runs.accuracy.steps_of", every_other)
    result = measure_accuracy()
    for curve in result.curves:
        if curve.method == "complex step":
            assert curve.plateau is not None
            assert curve.plateau.decades >= (250 if curve.dtype == "float64" else 25)
        else:
            assert curve.plateau is None
            # A V: worse at both ends of the sweep than at its best.
            assert curve.best[1] < 0.02 * min(e for e in (curve.errors[0], curve.errors[-1]) if e is not None)
    record, figure = save_accuracy(result, tmp_path / "out")
    saved = json.loads(record.read_text())
    assert saved["format"] == "imstep-accuracy/1"
    assert len(saved["curves"]) == 12
    assert set(saved["curves"][0]["plateau"]) == {"largest_h", "smallest_h", "worst_error", "decades"}
    assert figure.read_bytes().startswith(b"\x89PNG")
