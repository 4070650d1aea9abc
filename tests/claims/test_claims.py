"""`imstep claims` measures, says pass or fail, and tells failure by its exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner, Result

import imstep
from imstep.claims import derivatives, steps, training
from imstep.claims.claim import Figure, at_least, at_most
from imstep.claims.registry import CLAIMS
from imstep.cli import app, claiming
from imstep.globalization import TaylorMonitor


def imstep_command(*words: str) -> Result:
    return CliRunner().invoke(app, ["claims", *words])


def once(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    for work in works.values():
        work()
    return dict.fromkeys(works, 1.0)


def missed(figures: Sequence[Figure]) -> list[str]:
    return [figure.name for figure in figures if not figure.met]


QUICK = [derivatives.accuracy, derivatives.symmetry, derivatives.cost, steps.termination]


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.__name__)
def test_quick_claims_hold(check: Callable[[], Sequence[Figure]], monkeypatch: pytest.MonkeyPatch) -> None:
    # Seconds mean nothing while others share the core: every product is made once, and takes one.
    monkeypatch.setattr(derivatives, "median_seconds", once)
    assert missed(check()) == []


def test_the_models_error_is_of_third_order() -> None:
    assert steps._error_order(steps.Regression((4, 8, 1), 30, torch.float64), 0) == pytest.approx(3, abs=0.15)
    cost, _ = steps._down(TaylorMonitor(radius=1e-6))
    assert cost < 300


def test_every_other_check_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "METHODS", {"newton-cg": steps.METHODS["newton-cg"]})
    assert missed(steps.methods()) == ["methods by name"]
    monkeypatch.setattr(steps, "_FUNCTIONS", steps._FUNCTIONS[2:3])
    assert missed(steps.global_convergence()) == []


def test_an_order_is_read_at_our_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = lambda losses: [training.EvaluationRow(k, k, 10.0 * k, 2.0 * k, f, f) for k, f in enumerate(losses)]
    curves = {"least-squares": rows([1.0, 0.1]), "soap": rows([1.0] * 20 + [0.1]), "lbfgs": rows([1.0] * 41)}
    monkeypatch.setattr(training, "_curve", lambda task, name, *rest, **options: curves[name])
    assert [figure.value for figure in training.faster()] == [20.0, 20.0]
    curves["lbfgs"] = rows([1.0, 0.5, 0.01])
    assert [figure.value for figure in training.faster()] == [2.0, 2.0]
    assert [figure.met for figure in training.faster()] == [False, True]


def test_a_wrong_derivative_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = imstep.hvp
    monkeypatch.setattr(imstep, "hvp", lambda *args, **options: 1.001 * right(*args, **options))
    assert "worst error, float64" in missed(derivatives.accuracy())
    result = imstep_command("--only", "accuracy")
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert "missed: worst error" in result.output


def test_figures_keep_their_bounds() -> None:
    assert at_most("x", 1.0, 1.0).met
    assert at_least("x", 1.0, 1.0).met
    assert not at_most("x", float("nan"), 1.0).met
    assert not at_least("x", float("nan"), 1.0).met


def test_an_error_is_a_failure_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Sequence[Figure]:
        raise RuntimeError("no memory")

    good = replace(CLAIMS["symmetry"], check=lambda: [at_most("error", 0.0, 1.0)])
    chosen = {"cost": replace(CLAIMS["cost"], check=broken), "symmetry": good}
    monkeypatch.setattr(claiming, "CLAIMS", chosen)
    result = imstep_command()
    assert result.exit_code == 1
    assert "RuntimeError: no memory" in result.output
    assert "1 of 2 claims pass; failed: cost" in result.output
    assert imstep_command("--only", "symmetry").exit_code == 0


def test_names() -> None:
    result = imstep_command("--only", "acuracy")
    assert result.exit_code == 2
    assert "Did you mean 'accuracy'" in " ".join(result.output.split())
    assert "python -m benchmarks.termination" in imstep_command("--list").output
