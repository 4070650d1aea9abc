"""The strength benchmark in small: a run of it, what its record keeps, and how its tables judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.strength import record as records
from benchmarks.strength.__main__ import main
from benchmarks.strength.page import BEGIN, END, write_page
from benchmarks.strength.peers import cosine
from benchmarks.strength.record import StrengthRecord
from benchmarks.strength.run import KEPT_POINTS, StrengthRun, describe, thinned
from benchmarks.strength.table import verdicts
from benchmarks.strength.tasks import TASKS
from imstep.bench.averaging import EvaluatedAtAverage
from imstep.runs.optimizers import StepResult, get_optimizer
from imstep.runs.records import Point
from imstep.runs.steppers import GradientStepper
from imstep.tasks import AnyBatch, Problem, get_task


def made(side: str, seed: int, losses: list[float], seconds: float = 1.0) -> Any:
    """A run with a point every 100 equivalents and every so many seconds."""
    curve = tuple(Point(100.0 * k, seconds * k, k, float(k), f, 2 * f) for k, f in enumerate(losses))
    return StrengthRun(
        side, seed, {}, {"budget": 1.0}, "", curve, 0, {}, describe()
    )


def test_a_quick_run_is_kept_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["digits-cnn", "--quick", "--sides", "imstep-batches", "adam", "--records", str(tmp_path)]
    main(arguments)
    path = records.path_of(tmp_path, "digits-cnn")
    written = path.read_bytes()
    record = records.load(tmp_path, "digits-cnn")
    assert [(run.side, run.seed) for run in record.runs] == [("adam", 0), ("imstep-batches", 0)]
    for run in record.runs:
        assert run.best_at("seconds", float("inf")).train < run.curve[0].train
        assert run.curve[-1].seconds >= 0.299
        assert len(next(s for s in record.sweeps if s.optimizer == run.side).rows) == 4
    capsys.readouterr()
    main(arguments)
    assert path.read_bytes() == written
    assert "Digits CNN" in capsys.readouterr().out


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    run = made("imstep-batches", 3, [1.0, float("nan"), 0.25])
    record = records.add(tmp_path, "autoencoder", run)
    assert repr(records.load(tmp_path, "autoencoder")) == repr(record)
    again = records.add(tmp_path, "autoencoder", replace(run, products=7))
    assert [r.products for r in again.runs] == [7]
    (tmp_path / "autoencoder.json").write_text("{}")
    with pytest.raises(ValueError, match="not a record"):
        records.load(tmp_path, "autoencoder")


def test_figures_are_judged_by_the_worst_seed() -> None:
    task = TASKS["autoencoder"]
    slow, fast = [0.1, 0.05, 0.02, 0.01, 5.8e-3, 5e-3, 4e-3], [0.1, 0.05, 0.02, 0.01, 5.6e-3, 5e-3, 4e-3]
    soap = [made("soap", seed, slow, seconds=4.0) for seed in (0, 1)]
    verdict = lambda own: [row[1:] for row in verdicts(task, StrengthRecord("x", (), (*own, *soap))).rows]
    good = [made("imstep", seed, fast) for seed in (0, 1)]
    assert verdict(good) == [("450", "400", "met"), ("1,200", "600", "met"), ("0.33", "0.25", "met")]
    mixed = [good[0], made("imstep", 1, slow[:-1], seconds=2.0)]
    missed = "**missed**"
    assert verdict(mixed) == [("450", "500", missed), ("1,200", "never", missed), ("0.33", "never", missed)]


def test_convection_is_judged_by_a_race_and_the_lowest_loss() -> None:
    task = TASKS["convection-float64"]
    soap = [made("soap-cosine", 0, [1.0, 1e-3, 1e-5], seconds=4.0)]  # it never came to 1e-6
    verdict = lambda own: [row[1:] for row in verdicts(task, StrengthRecord("x", (), (*own, *soap))).rows]
    good = made("imstep-residual", 0, [1.0, 1e-3, 1e-6, 9e-10])
    assert verdict([good]) == [("0.50", "0.25", "met"), ("1.00e-9", "9.00e-10", "met")]
    bad = made("imstep-residual", 0, [1.0, 1e-3, 2e-6, 2e-6])
    assert verdict([good, bad])[1][1:] == ("2.00e-6", "**missed**")
    assert verdict([good, bad])[0][1:] == ("never", "**missed**")


def test_losses_are_read_at_the_marks() -> None:
    run = made("imstep", 0, [1.0, 0.2, 0.3, 0.1])
    assert run.best_at("cost", 250.0).train == 0.2
    assert run.last_at("cost", 250.0).train == 0.3
    assert run.last_at("cost", -1.0) is run.curve[0]
    assert run.first_below(0.25) is run.curve[1]
    assert run.first_below(0.05) is None


def test_thinning_keeps_what_will_be_read() -> None:
    task = replace(TASKS["autoencoder"], marks=(505.0,), levels=(0.2345,))
    points = [Point(float(k), k / 7, k, float(k), 1 - k / 1000, 0.5) for k in range(1000)]
    kept = thinned(points, task)
    assert len(kept) <= KEPT_POINTS + 3
    assert {0.0, 505.0, 766.0, 999.0} <= {p.cost for p in kept}


def test_a_cosine_goes_from_one_to_zero() -> None:
    assert [cosine(x) for x in (0.0, 1 / 3, 0.5, 1.0, 1.1)] == pytest.approx([1, 0.75, 0.5, 0, 0])


def test_the_page_keeps_its_text(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    page = tmp_path / "strength.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    runs = tuple(made(side, seed, [0.1, 0.05, 4e-3]) for side in ("imstep", "soap") for seed in (0, 1))
    write_page([StrengthRecord("autoencoder", (), runs)], docs=tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| SOAP | 2 | 4.00e-3 |" in text
    assert (tmp_path / "images" / "strength-autoencoder.png").stat().st_size > 0


def test_what_is_evaluated_is_the_average_of_the_iterates() -> None:
    problem = get_task("digits-mlp").build(0, examples=60)
    weight = problem.parameters[0]
    stepper = EvaluatedAtAverage(get_optimizer("sgd").create(problem, lr=0.1), problem.model, decay=0.5)
    iterates = []
    for batch in problem.batches(0, 20):
        stepper.step(problem, batch)
        iterates.append(weight.detach().clone())
    with stepper.evaluating():
        torch.testing.assert_close(weight.detach(), iterates[0] / 4 + iterates[1] / 4 + iterates[2] / 2)
    assert torch.equal(weight.detach(), iterates[2])


def test_an_average_reaches_back_over_gradients_not_steps() -> None:
    class Dear(GradientStepper):
        def step(self, problem: Problem, batch: AnyBatch) -> StepResult:
            return replace(super().step(problem, batch), cost=2.0)

    problem = get_task("digits-mlp").build(0, examples=60)
    weight = problem.parameters[0]
    stepper = EvaluatedAtAverage(Dear(torch.optim.SGD(problem.parameters, 0.1)), problem.model, decay=0.5)
    iterates = []
    for batch in problem.batches(0, 20):
        stepper.step(problem, batch)
        iterates.append(weight.detach().clone())
    with stepper.evaluating():
        torch.testing.assert_close(weight.detach(), (iterates[0] + 3 * iterates[1] + 12 * iterates[2]) / 16)
