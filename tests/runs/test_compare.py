"""Comparisons: equal starts, equal budgets, honest sweeps, and a verdict that says who won."""

from __future__ import annotations

import json
import math

import pytest

from imstep.runs.compare import compare
from imstep.runs.contestants import Contestant, contestants
from imstep.runs.optimizers import OptimizerError, get_optimizer
from imstep.runs.records import Comparison, Point, RecordError, Run, Sweep, SweepRow
from imstep.runs.rows import TrainingError
from imstep.runs.verdict import judge
from imstep.tasks import TaskError, get_task

SETTING = {"budget": 12.0, "examples": 60, "seed": 1}


def run_of(label: str, *losses: float, seconds: float = 1.0) -> Run:
    """A run with one point per gradient-equivalent."""
    points = tuple(Point(float(i), seconds * i, i, float(i), loss, 2 * loss) for i, loss in enumerate(losses))
    return Run(label.lower(), label, {}, points)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    rivals = [
        Contestant(get_optimizer("lbfgs"), options={"max_iter": 4}),
        Contestant(get_optimizer("adam"), learning_rates=(1e-3, 1e-2)),
        Contestant(get_optimizer("adam"), batch_size=20, learning_rates=(1e-2,)),
    ]
    return compare("digits-autoencoder", rivals, **SETTING)


def test_all_start_at_the_same_loss(comparison: Comparison) -> None:
    starts = {run.points[0].train for run in comparison.runs}
    assert len(starts) == 1
    assert all(run.points[0].cost == 0 for run in comparison.runs)


def test_no_point_lies_beyond_the_budget_and_costs_ascend(comparison: Comparison) -> None:
    for run in comparison.runs:
        costs = [point.cost for point in run.points]
        assert costs == sorted(costs)
        assert costs[-1] <= 12.0 * (1 + 1e-9)


def test_first_order_methods_spend_exactly_the_budget(comparison: Comparison) -> None:
    adam, minibatch = comparison.runs[1:]
    assert (adam.final.cost, adam.final.steps) == (pytest.approx(12), 12)
    assert (minibatch.final.cost, minibatch.final.steps) == (pytest.approx(12), 36)


def test_the_sweep_chooses_the_lowest_loss_and_keeps_every_row(comparison: Comparison) -> None:
    (sweep,) = comparison.sweeps
    assert [row.options["lr"] for row in sweep.rows] == [1e-3, 1e-2]
    assert sweep.chosen.loss == min(row.loss for row in sweep.rows) == comparison.runs[1].best.train
    assert comparison.runs[1].options["lr"] == sweep.chosen.options["lr"]
    assert sweep.at_the_edge


def test_pictures_are_held_out_reconstructions(comparison: Comparison) -> None:
    assert len(comparison.originals) == len(comparison.runs[0].pictures) == 12
    assert len(comparison.originals[0]) == len(comparison.originals[0][0]) == 8
    assert all(0 <= pixel <= 255 for row in comparison.runs[0].pictures[0] for pixel in row)


def test_losses_repeat(comparison: Comparison) -> None:
    rival = Contestant(get_optimizer("lbfgs"), options={"max_iter": 4})
    again = compare("digits-autoencoder", [rival], **SETTING)
    assert [p.train for p in again.runs[0].points] == [p.train for p in comparison.runs[0].points]


@pytest.mark.parametrize("settings", [0, 1, 2])
def test_a_stopped_comparison_goes_on_to_the_same_numbers(comparison: Comparison, settings: int) -> None:
    rivals = [
        Contestant(get_optimizer("lbfgs"), options={"max_iter": 4}),
        Contestant(get_optimizer("adam"), learning_rates=(1e-3, 1e-2)),
    ]
    kept: list[Comparison] = []
    stopped = compare("digits-autoencoder", rivals, **SETTING, keep=kept.append, stop=lambda: len(kept) == settings)
    assert (len(stopped.runs), len(stopped.tried)) == [(0, 0), (1, 0), (1, 1)][settings]
    assert stopped.waiting == (("L-BFGS",) if settings == 0 else ()) + ("Adam",)
    assert stopped.verdict.headline.startswith("Unfinished") or settings == 0
    assert not settings or kept[-1] == stopped
    earlier = Comparison.from_dict(json.loads(json.dumps(stopped.to_dict(), allow_nan=False)))
    whole = compare("digits-autoencoder", rivals, **SETTING, earlier=earlier, keep=kept.append)
    assert len(kept) == 3
    losses = lambda runs: [[point.train for point in run.points] for run in runs]
    assert losses(whole.runs) == losses(comparison.runs[:2])
    assert [row.loss for row in whole.sweeps[0].rows] == [row.loss for row in comparison.sweeps[0].rows]
    assert whole.seconds > stopped.seconds
    assert (whole.waiting, whole.tried) == ((), ())


def test_the_record_survives_json(comparison: Comparison) -> None:
    record = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert Comparison.from_dict(record) == comparison


def test_a_diverged_rate_is_recorded_and_not_chosen() -> None:
    rival = Contestant(get_optimizer("sgd"), learning_rates=(1e38, 0.1))
    result = compare("digits-mlp", [rival], **SETTING)
    bad, good = result.sweeps[0].rows
    assert "diverged" in bad.note
    assert result.sweeps[0].chosen == good
    assert result.runs[0].options["lr"] == 0.1
    json.dumps(result.to_dict(), allow_nan=False)


def test_classification_has_no_reconstructions() -> None:
    result = compare("digits-mlp", [Contestant(get_optimizer("lbfgs"))], **SETTING)
    assert result.originals == ()
    assert result.runs[0].pictures == ()


def test_verdict_on_a_rival_that_got_nowhere_divides_by_nothing() -> None:
    verdict = judge((run_of("New", 8, 2, 1), run_of("Old", 8)), 2.0)
    assert verdict.details[0] == "Old did not get below the loss at the start (8.00) within the budget."


def test_verdict_names_the_winner_and_the_factor() -> None:
    verdict = judge((run_of("New", 8, 2, 1), run_of("Old", 8, 6, 4)), 2.0)
    assert verdict.won
    assert verdict.factor == pytest.approx(4)
    assert "New reached the lowest training loss" in verdict.headline
    assert "4.0 times lower" in verdict.headline
    assert "after 1 gradient-equivalents instead of 2 (2.0 times fewer)" in verdict.details[0]


def test_verdict_says_plainly_when_the_subject_lost() -> None:
    verdict = judge((run_of("New", 8, 6, 5), run_of("Old", 8, 3, 2), run_of("Other", 8, 7, 6)), 2.0)
    assert not verdict.won
    assert verdict.factor == pytest.approx(2.5)
    assert verdict.headline.startswith("New did not reach the lowest training loss")
    assert "never reached" in verdict.details[0]


def test_verdict_uses_the_lowest_loss_not_the_last() -> None:
    assert not judge((run_of("New", 8, 4, 3), run_of("Old", 8, 2, 7)), 2.0).won


def test_verdict_asks_the_clock_when_the_quickest_run_ended() -> None:
    verdict = judge((run_of("New", 8, 4, 1, seconds=2.0), run_of("Old", 8, 3, 2)), 2.0)
    assert verdict.won
    assert "after 2.0 s (when the quickest run ended): Old 2.00, New 4.00" in " ".join(verdict.details)


def test_a_run_of_nan_loses() -> None:
    verdict = judge((run_of("New", 8, math.nan, math.nan), run_of("Old", 8, 3, 2)), 2.0)
    assert not verdict.won
    assert verdict.factor == pytest.approx(4)


def test_sweep_edge_is_seen_only_at_the_edge() -> None:
    rows = tuple(SweepRow({"lr": lr}, loss, 1.0) for lr, loss in ((0.1, 3.0), (0.2, 1.0), (0.4, math.nan)))
    assert not Sweep("X", 1.0, rows).at_the_edge
    assert Sweep("X", 1.0, rows[:2]).at_the_edge


def test_contestants_by_name() -> None:
    chosen = contestants(("lbfgs", "adam"), minibatch=30)
    assert [(c.title, len(c.candidates())) for c in chosen] == [
        ("L-BFGS", 1), ("Adam", 4), ("Adam, batch 30", 4),
    ]  # fmt: skip
    assert [c.title for c in contestants(("adam",), batch_size=50)] == ["Adam, batch 50"]


def test_what_is_for_mini_batches_has_some() -> None:
    names = ("newton-krylov", "newton-krylov-batches")
    assert [c.batch_size for c in contestants(names, minibatch=30)] == [None, 30]
    assert [c.batch_size for c in contestants(names, batch_size=50)] == [50, 50]
    assert [c.batch_size for c in contestants(names, minibatch=None)] == [None, None]


def test_the_average_is_what_is_evaluated() -> None:
    problem = get_task("digits-mlp").build(0, examples=60)
    stepper = get_optimizer("newton-krylov-batches").create(problem)
    for _ in range(3):
        stepper.step(problem, problem.train)
    last = problem.evaluate(problem.train).loss
    with stepper.evaluating():
        assert problem.evaluate(problem.train).loss != last
    assert problem.evaluate(problem.train).loss == last


def test_verdict_says_where_each_would_have_been_stopped() -> None:
    verdict = judge((run_of("New", 8, 2, 4), run_of("Old", 8, 6, 3)), 2.0)
    assert verdict.details[-1] == (
        "Stopped early, each where its held-out loss is lowest: New 4.00 after 1 gradient-equivalents, "
        "Old 6.00 after 2 gradient-equivalents."
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: contestants(()), TrainingError, "at least one"),
        (lambda: contestants(("adam", "adam")), TrainingError, "twice"),
        (lambda: contestants(("adm",)), OptimizerError, "Did you mean 'adam'"),
        (lambda: compare("digits-autoencoder", []), TrainingError, "at least one"),
        (lambda: compare("digit", [Contestant(get_optimizer("adam"))]), TaskError, "there is no task"),
        (lambda: compare("digits-mlp", contestants(("adam",)), budget=0), TrainingError, "above 0"),
        (lambda: compare("digits-mlp", contestants(("adam",)), threads=0), TrainingError, "at least one"),
        (lambda: Comparison.from_dict({"format": "other"}), RecordError, "'other'"),
        (lambda: Comparison.from_dict({"format": "imstep-compare/1"}), RecordError, "damaged"),
    ],
)
def test_misuse_is_told_clearly(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
