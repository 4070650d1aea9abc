"""The bench in small: its runs are kept and gone on with, its trials are equal, its table says who wins."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from threadpoolctl import threadpool_info
from typer.testing import CliRunner, Result

from benchmarks.suite.__main__ import pack, page, unpack
from imstep import methods
from imstep.bench import ENTRIES, Entry, Range, peers, work
from imstep.bench.entries import FULL, entries_of, entry_of
from imstep.bench.entry import ACCURACY, TRAIN
from imstep.bench.peers import MuonAndAdamW
from imstep.bench.references import Fitted
from imstep.bench.request import FULL_TRIALS, BenchRequest, chosen, estimate, gather, trials_of
from imstep.bench.session import run_bench
from imstep.bench.sides import OWN, SIDES, Side, side_of
from imstep.bench.store import BenchRun, Store
from imstep.bench.summary import Duel, summarise
from imstep.bench.sweep import sweeps
from imstep.bench.work import Apart, Job, perform
from imstep.cli import app
from imstep.curvature import StructuralDamping
from imstep.globalization import LevenbergMarquardt
from imstep.runs.optimizers import OptimizerError
from imstep.runs.rows import TrainingError
from imstep.runs.rundir import RunDirectoryError
from imstep.runs.seconds import Seconds
from imstep.tasks import Batch, TaskError, get_task
from imstep.tasks.suite import recurrent

SMALL = Entry("digits-mlp", budget=2.0, examples=20, sides=("adamw",))


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    # What each run would import is there already.
    import_module("imstep.bench.preload")
    monkeypatch.setattr(work, "METHOD", "fork")
    get_task("digits-mlp").build(examples=2)


def imstep_command(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words])


def told(job: Job, *messages: tuple[Any, ...]) -> Apart:
    """A run of which all is told already."""
    ours, theirs = Pipe(duplex=False)
    for message in messages:
        theirs.send(message)
    theirs.close()
    return Apart(job, ours)


def without_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imstep.bench.report.write_report", lambda request, store: None)


def flat_run(job: Job, **others: Any) -> dict[str, Any]:
    """A run of three points."""
    curve = [[float(k), k, k, k, 1.0 / 9**k, 1.0, None, 0.5] for k in range(3)]
    record = {"format": work.FORMAT, "columns": work.COLUMNS, "curve": curve, "request": job.request, "ending": ""}
    return {**record, "entry": job.entry.label, "kind": job.kind, **others}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*-*.json")}


def test_the_short_form_is_kept_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--short", "--sides", "muon", "--out", str(tmp_path / "b")]
    result = imstep_command(*words)
    assert result.exit_code == 0, (result.output, result.exc_info)
    before = files(tmp_path / "b")
    assert sorted(before) == [
        f"digits-mlp/{run}.json"
        for run in (f"{side}/{kind}" for side in ("imstep", "muon") for kind in ("seed-0", "trial-00", "trial-01"))
    ]
    for text in before.values():
        record = json.loads(text)
        assert record["about"]["threads"] == "1"
        assert record["request"]["clock"] == "processor"
        assert {"PyTorch", "processor", "instructions", "date"} <= set(record["about"])
        costs = [row[0] for row in record["curve"]]
        assert costs[0] == 0
        assert costs[-1] >= record["request"]["limits"]["budget"] - 1e-6
    page = (tmp_path / "b" / "digits-mlp.html").read_text()
    assert "Muon" in page
    assert "2 trials of 2 gradient-equivalents" in page
    assert "digits-mlp.html" in (tmp_path / "b" / "index.html").read_text()
    (summary,) = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert set(summary["duels"]) == {"cost", "seconds"}
    assert "processor seconds" in page
    without_a_report(monkeypatch)
    assert imstep_command(*words).exit_code == 0
    assert files(tmp_path / "b") == before
    for more, why in ((("--budget", "5"), "Runs are not replaced"), (("--clock", "wall"), "Seconds of two clocks")):
        other = imstep_command(*words, *more)
        assert other.exit_code == 2
        assert why in " ".join(other.output.split())
    assert files(tmp_path / "b") == before


def test_an_interrupted_bench_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_report(monkeypatch)
    made: list[str] = []

    def launch(job: Job) -> Apart:
        made.append(f"{job.side} {job.kind}")
        if len(made) == 3:
            raise KeyboardInterrupt
        return told(job) if len(made) == 5 else told(job, ("done", perform(job)))

    request = BenchRequest([SMALL], trials=3, seeds=(0,))
    console = Console(quiet=True)
    assert not run_bench(request, tmp_path, console, launch=launch)
    assert not run_bench(request, tmp_path, console, launch=launch)
    assert run_bench(request, tmp_path, console, launch=launch)
    trials = [f"adamw trial-0{k}" for k in range(3)]
    # The third was lost; then one process died, so that nothing could be chosen for its side.
    assert made == [*trials, trials[2], "imstep seed-0", "adamw seed-0", "imstep seed-0"]
    tuning, runs = gather(request, SMALL, Store(tmp_path))
    best = min(tuning["adamw"], key=lambda run: run.best(TRAIN))
    assert runs["adamw"][0].options == best.options
    assert len(tuning[OWN]) == 0


def test_absent_data_leaves_a_task_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    launch = lambda job: told(job, ("absent", "apt install it"))
    assert run_bench(BenchRequest([SMALL]), tmp_path, Console(), jobs=2, launch=launch)
    assert capsys.readouterr().out.count("left out") == 1


def test_runs_go_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two; runs begin when all trials are there; asked to stop, it finishes what runs."""
    without_a_report(monkeypatch)
    open_now: list[str] = []
    most: list[int] = []
    stop: list[str] = []

    class Watched(Apart):
        def hear(self, tell: Any) -> dict[str, Any] | None:
            record = super().hear(tell)
            if record is not None:
                open_now.remove(f"{self.job.side} {self.job.kind}")
            return record

    def launch(job: Job) -> Apart:
        name = f"{job.side} {job.kind}"
        assert job.trial or not any("trial" in other for other in open_now)
        open_now.append(name)
        most.append(len(open_now))
        if name in stop:
            signal.raise_signal(signal.SIGINT)
        return Watched(job, told(job, ("at", 0.5, 1.0), ("done", flat_run(job))).pipe)

    request = BenchRequest([SMALL], trials=3, seeds=(0, 1))
    stop.append("imstep seed-0")
    assert not run_bench(request, tmp_path, Console(quiet=True), jobs=2, launch=launch)
    assert open_now == []
    assert sorted(files(tmp_path)) == [f"digits-mlp/adamw/trial-0{k}.json" for k in range(3)] + [
        "digits-mlp/imstep/seed-0.json"
    ]
    stop.clear()
    assert run_bench(request, tmp_path, Console(quiet=True), jobs=2, launch=launch)
    assert len(files(tmp_path)) == 7
    assert max(most) == 2


def test_a_second_interruption_kills_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_report(monkeypatch)
    killed: list[str] = []

    class Watched(Apart):
        def kill(self) -> None:
            killed.append(self.job.kind)
            super().kill()

    def launch(job: Job) -> Apart:
        if job.kind == "trial-02":
            raise KeyboardInterrupt
        return Watched(job, told(job, ("at", 0.5, 1.0), ("at", 0.6, 1.0)).pipe)

    request = BenchRequest([SMALL], trials=3, seeds=(0,))
    assert not run_bench(request, tmp_path, Console(quiet=True), jobs=3, launch=launch)
    assert killed == ["trial-00", "trial-01"]


def test_other_runs_are_not_measured_on_the_wall(tmp_path: Path) -> None:
    walled = BenchRequest([SMALL.asked(clock=Seconds.WALL)])
    for request, jobs in ((walled, 2), (BenchRequest([SMALL]), 0)):
        with pytest.raises(TrainingError, match="side by side"):
            run_bench(request, tmp_path, Console(quiet=True), jobs=jobs)


def test_runs_that_name_no_clock_were_made_on_the_wall(tmp_path: Path) -> None:
    store, job = Store(tmp_path), trials_of(SMALL.asked(clock=Seconds.WALL), SIDES["adamw"], 1)[0]
    former = {key: value for key, value in job.request.items() if key != "clock"}
    store.keep(job, flat_run(job, request=former))
    assert store.find(job) is not None
    with pytest.raises(RunDirectoryError, match="clock=wall, and processor"):
        store.find(replace(job, entry=SMALL))


def test_a_program_that_takes_more_threads_is_told_so(tmp_path: Path) -> None:
    program = tmp_path / "threads.py"
    program.write_text(
        "import torch\nfrom torch import nn\nfrom imstep.tasks import ExampleTask, held_out\n"
        "def load(data):\n    torch.set_num_threads(2)\n    return held_out(*torch.ones(2, 20, 1))\n"
        "task = ExampleTask('threads', 'Threads', '20 points.', load, lambda: nn.Linear(1, 1), nn.MSELoss())\n"
    )
    entry = Entry(str(program), budget=2.0, sides=())
    with pytest.raises(TrainingError, match="2 threads compute: ask for wall seconds"):
        run_bench(BenchRequest([entry]), tmp_path / "b", Console(quiet=True))


def test_the_usual_list_is_short_and_the_full_one_is_at_least_as_long() -> None:
    hours = lambda entry, trials: sum(estimate(entry, side, trials=trials) for side in entry.contestants()) / 3600
    usual = {name: hours(entry, 4) for name, entry in ENTRIES.items()}
    assert max(usual.values()) < 4
    assert sum(usual.values()) < 49
    for name, entry in ENTRIES.items():
        full = FULL[name]
        assert hours(full, FULL_TRIALS) >= usual[name]
        assert {s.name for s in full.contestants()} >= {s.name for s in entry.contestants()}
        assert (full.measure, full.target, full.decay) == (entry.measure, entry.target, entry.decay)
        assert (full.ours, full.until_solved) == (entry.ours, entry.until_solved)
        assert (full.examples or 10**9) >= (entry.examples or 10**9)
    assert entry_of("fashion-resnet20") is FULL["fashion-resnet20"]
    assert entry_of("wave").budget < entry_of("wave", full=True).budget


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="nothing can be made in"):
        Store(tmp_path / "file" / "bench")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match="other files"):
        Store(tmp_path)


def test_short_and_full_forms_exclude_each_other() -> None:
    result = imstep_command("digits-mlp", "--short", "--full", "--list")
    assert result.exit_code == 2
    assert "give one of them" in result.output


@pytest.mark.parametrize("arguments", [{"trials": 0}, {"seeds": ()}, {"seeds": (1, 1)}, {"seeds": (100,)}])
def test_a_bench_without_trials_or_seeds_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(TrainingError):
        BenchRequest([SMALL], **arguments)


def test_limits_of_ones_own() -> None:
    entry = ENTRIES["digits-cnn"]
    asked = entry.asked(seconds=15.0)
    assert (asked.limits.seconds, asked.trial_limits.budget) == (15.0, 100.0)
    assert entry.asked(budget=50.0).trial_limits.budget == 25.0
    for wrong in ({"budget": 1.0, "seconds": 1.0}, {"budget": -1.0}, {"seconds": math.nan}):
        with pytest.raises(TrainingError):
            entry.asked(**wrong)


def test_all_that_are_tuned_have_equal_trials_in_their_ranges() -> None:
    for entry in {**FULL, **ENTRIES}.values():
        sides = entry.contestants()
        assert sides[0].name == OWN
        assert len(sides) >= 4
        for side in sides:
            _has_its_trials(entry, side)


def _has_its_trials(entry: Entry, side: Side) -> None:
    for number in (4, 8):
        ranges, jobs = entry.ranges_of(side), trials_of(entry, side, number)
        assert ("weight_decay" in ranges) == entry.decay, entry.label
        assert len(jobs) == (number if ranges else 0), entry.label
        assert bool(ranges) or side.name == OWN, entry.label
        for job in jobs:
            for name, value in job.options.items():
                assert value == 0.0 < ranges[name].none or ranges[name].low <= value <= ranges[name].high
        assert len({tuple(job.options.values()) for job in jobs}) == len(jobs)


def test_trials_spread_over_a_range() -> None:
    shares = sorted(math.log10(t["lr"]) for t in SIDES["adamw"].trials(8, {"lr": Range(1e-8, 1.0)}))
    assert max(b - a for a, b in pairwise(shares)) < 2.2
    assert shares[0] < -6.8
    assert shares[-1] > -1.2
    with pytest.raises(ValueError, match="range"):
        Range(1.0, 0.1)
    assert side_of("torch.optim:RMSprop").trials(2, side_of("torch.optim:RMSprop").ranges)[0] == {"lr": 0.01}


def made_up(side: str, losses: list[float], seconds: float, seed: int = 0) -> BenchRun:
    """A run with a point every 100 equivalents."""
    curve = [[100.0 * k, seconds * k, k, k, f, 2 * f, None, 1 - f] for k, f in enumerate(losses)]
    return BenchRun({"columns": work.COLUMNS, "curve": curve, "request": {"side": side, "seed": seed, "options": {}}})


def test_the_table_says_who_wins_by_what_factor() -> None:
    runs = {
        "imstep": [made_up("imstep", [1.0, 0.1, 0.01], 5.0)],
        "adamw": [made_up("adamw", [1.0, 0.7, 0.5, 0.1], 1.0)],
    }
    summary = summarise(SMALL, runs)
    assert summary is not None
    assert summary.level == 0.1
    assert summary.duels["cost"] == Duel("AdamW", 100.0, 300.0)
    assert [duel.words for duel in summary.duels.values()] == ["imstep, 3.0 times", "AdamW, 1.7 times"]
    assert summary.leader.endswith("1.00e-2")
    # Accuracy: more is better; the level is the lower of the two best.
    judged = summarise(replace(SMALL, measure=ACCURACY), runs)
    assert judged is not None
    assert judged.level == pytest.approx(-0.9)
    targeted = summarise(replace(SMALL, target=0.02), runs)
    assert targeted is not None
    assert targeted.duels["cost"].words == "imstep; AdamW never"
    assert summarise(replace(SMALL, target=1e-9), runs).duels["cost"].words == "neither"  # type: ignore[union-attr]
    assert summarise(SMALL, {}) is None


def test_a_sweep_tells_from_which_batch_size_on_we_lead() -> None:
    """A run whose measure falls by a tenth at a step; an epoch has 8 steps of the smallest batches, 2 of the larger."""
    entries = [
        replace(SMALL, name=f"s-{size}", batch_size=size, target=0.05, sweep="s", sides=("adamw",)) for size in (16, 64)
    ]

    def run(steps: int, evaluations: float, in_epoch: int) -> BenchRun:
        curve = [
            [k * evaluations / in_epoch, 2.0 * k, k, k / in_epoch, 1.0 if k < steps else 0.04, None, None, None]
            for k in range(steps + 2)
        ]
        return BenchRun({"columns": work.COLUMNS, "curve": curve})

    runs = {
        "s-16": {"imstep": [run(50, 5.0, 8)], "adamw": [run(60, 1.0, 8)]},
        "s-64": {"imstep": [run(7, 5.0, 2)], "adamw": [run(40, 1.0, 2)]},
    }
    (found,) = sweeps([SMALL, *entries], runs)
    assert [(c.batch_size, c.side, c.steps, c.depth, c.seconds) for c in found.cells] == [
        (16, "imstep", 50, 250, 100), (16, "adamw", 60, 60, 120), (64, "imstep", 7, 35, 14), (64, "adamw", 40, 40, 80),
    ]  # fmt: skip
    assert [found.leads_from(of) for of in ("steps", "depth", "seconds")] == [16, 64, 16]
    assert found.rows[2] == ("64", "imstep (NK.for_batches)", "1/1", "7", "35", "14")
    assert sweeps(entries, {}) == []


def test_a_report_has_a_table_of_batch_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imstep.bench.report._page", lambda *arguments: "")
    entries = [replace(SMALL, name=f"s-{size}", batch_size=size, target=0.05, sweep="s") for size in (5, 10)]

    launch = lambda job: told(job, ("done", flat_run(job)))
    assert run_bench(BenchRequest(entries, trials=1, seeds=(0,)), tmp_path / "b", Console(quiet=True), launch=launch)
    for text in ((tmp_path / "b" / name).read_text() for name in ("index.html", "summary.md")):
        assert "s by batch size, to a training loss of 5.00e-2" in text
        assert "imstep is first in steps: from batches of 5 on" in text
    assert "| 10 | AdamW | 1/1 | 2 | 2 | 2 |" in text


def test_entries_are_asked_for_by_pattern() -> None:
    assert [entry.batch_size for entry in entries_of("shakespeare-gpt-*")] == [16, 64, 256, 1024, 4096]
    assert entries_of("wave") == [ENTRIES["wave"]]
    with pytest.raises(TaskError, match="no entry of the bench fits"):
        entries_of("wafe*")


def test_a_table_is_benched_by_a_program_that_names_its_target(tmp_path: Path) -> None:
    table, program = tmp_path / "data.csv", tmp_path / "table.py"
    table.write_text("a,b\n" + "".join(f"{i},{i % 7}\n" for i in range(60)))
    with pytest.raises(TaskError, match="takes no options") as told:
        entries_of(str(table))
    call = str(told.value).partition("task = ")[2].partition("; or")[0]
    program.write_text(f"import imstep.tasks\ntask = {call.replace('...', repr('b'))}\n")
    assert entries_of(str(program))[0].task == str(program)


class Limited:
    """A regressor that sees how many threads it may have."""

    def fit(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        self.threads = {pool["num_threads"] for pool in threadpool_info()}


def test_other_regressors_give_figures_and_take_part_in_no_duel(tmp_path: Path) -> None:
    program = tmp_path / "line.py"
    program.write_text(
        "import torch\nfrom torch import nn\nfrom imstep.tasks import ExampleTask, held_out\n"
        "x = torch.linspace(-1, 1, 200)[:, None]\n"
        "load, model = lambda data: held_out(x, 3 * x.sign()), lambda: nn.Linear(1, 1)\n"
        "task = ExampleTask('line', 'A line', '200 points.', load, model, nn.MSELoss())\n"
    )
    entry = Entry(str(program), budget=2.0, sides=("adamw", "sklearn-mlp", "sklearn-boosting"))
    runs: dict[str, list[BenchRun]] = {}
    for side in entry.contestants():
        job = Job(entry, side.name, side.spec.name, "seed-0", {}, 0, entry.limits)
        runs[side.name] = [BenchRun(perform(job))]
    for name, loss in (("sklearn-boosting", 0.01), ("sklearn-mlp", 2.0)):
        curve = runs[name][0].record["curve"]
        assert curve[-1][5] < loss < curve[0][5]  # the held-out loss of a step
    fitted = Fitted(get_task(str(program)).build(), limits := Limited())
    fitted.step(None, Batch(torch.zeros(2, 1), torch.zeros(2, 1)))  # type: ignore[arg-type]
    assert limits.threads == {1}
    summary = summarise(entry, dict(runs))
    assert summary is not None
    assert summary.duels["cost"].peer == "AdamW"
    assert summary.leader.startswith("gradient boosting")


def test_adam_comes_before_lbfgs() -> None:
    entry = Entry("digits-mlp", budget=4.0, examples=20, sides=("adam-lbfgs",))
    job = Job(entry, "adam-lbfgs", "adam-lbfgs", "seed-0", {"first": 2.0, "lr": 1e-3}, 0, entry.limits)
    record = perform(job)
    assert record["steps"] == 3
    assert record["curve"][-1][0] > 4  # the third is many evaluations
    clipped = peers._ClippedAdam([torch.nn.Parameter(torch.zeros(2))])
    (p,) = clipped.param_groups[0]["params"]
    p.grad = torch.tensor([30.0, 40.0])
    clipped.step()
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))


def test_recurrent_networks_begin_otherwise_or_have_other_cells() -> None:
    one, two = (get_task("memory-5bit-200").build(seed) for seed in (0, 1))
    before = one.model.layer.weight_ih_l0.clone()
    SIDES["adam-orthogonal"].spec.create(one)
    weight = one.model.layer.weight_hh_l0.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)
    assert torch.equal(one.model.layer.weight_ih_l0, before)
    lstm = SIDES["lstm-adam"].spec.create(two)
    assert type(two.model.layer).__name__ == "LSTM"
    sizes = [p.shape for group in lstm.optimizer.param_groups for p in group["params"]]
    assert sizes == [p.shape for p in two.parameters]
    assert two.evaluate(two.heldout.take(slice(0, 2))).loss > 0
    with pytest.raises(OptimizerError, match="no recurrent tanh layer"):
        SIDES["lstm-adam"].spec.create(get_task("digits-mlp").build(examples=2))


def test_published_methods_damp_hidden_states_too() -> None:
    one, two = (recurrent.addition(24).build(0, examples=8) for _ in range(2))
    result = SIDES["kfac"].spec.create(one, structural=5.0).step(one, one.train)
    optimizer = methods.kfac(two.parameters, damping=LevenbergMarquardt(initial=1.0, factor=1.2))
    optimizer.step(StructuralDamping(*two.states, weight=5.0)(two.closure(two.train)))
    assert result.new_loss == optimizer.last_step.new_loss
    for entry in entries_of("*-80"):
        tuned = [side.name for side in entry.contestants() if "structural" in entry.ranges_of(side)]
        assert tuned == [OWN, "hessian-free"]


def test_the_best_trial_is_chosen() -> None:
    entry, side = SMALL, SIDES["adamw"]
    jobs = trials_of(entry, side, 3)
    tried = [made_up("adamw", losses, 1.0) for losses in ([1.0, 0.5], [1.0, float("nan")], [1.0, 0.2])]
    assert chosen(entry, tried, jobs) == jobs[2].options
    # Where runs end at the target, who was there first counts; else the least held-out loss, not the luckiest answers.
    ends = replace(entry, measure=ACCURACY, target=0.9, until_solved=True)
    figures = {"a": [(5, 1.0, 0.5), (9, 0.2, 0.95)], "b": [(5, 1.0, 0.5), (7, 0.3, 0.91)], "c": [(5, 0.9, 0.6)]}
    columns = ("cost", "heldout", "heldout_metric")
    runs = {name: BenchRun({"columns": columns, "curve": curve}) for name, curve in figures.items()}
    assert chosen(ends, [runs[name] for name in "abc"], jobs) == jobs[1].options
    assert chosen(ends, [BenchRun({"columns": columns, "curve": [(5, loss, share)]}) for loss, share in
                         ((0.4, 0.5), (0.5, 0.7), (0.45, 0.6))], jobs) == jobs[0].options


def test_a_run_may_end_where_it_has_solved_its_task() -> None:
    entry = Entry("digits-mlp", budget=200.0, examples=20, target=2.0, until_solved=True, sides=("adamw",))
    job = Job(entry, "adamw", "adamw", "seed-0", {"lr": 1e-2}, 0, entry.limits)
    record = perform(job)
    assert record["ending"] == work.SOLVED
    *before, last = (BenchRun(record).points[k]["train"] for k in range(len(record["curve"])))
    assert last <= 2.0 < min(before)
    assert record["curve"][-1][0] < 200
    assert record["request"]["until"] == 2.0
    assert "until" not in replace(job, entry=replace(entry, until_solved=False)).request


def test_a_refusal_is_a_result() -> None:
    entry = Entry("digits-mlp", budget=1.0, examples=8, ours="least-squares", sides=())
    job = Job(entry, OWN, "least-squares", "seed-0", {}, 0, entry.limits)
    assert perform(job)["ending"].startswith("refused")


def test_recorded_runs_are_found_again_and_make_the_same_page(tmp_path: Path) -> None:
    entry, request = SMALL, BenchRequest([SMALL], trials=1, seeds=[0])
    run_bench(request, tmp_path / "first", Console(quiet=True))
    pack(entry, Store(tmp_path / "first"), tmp_path / "records")
    again = Store(tmp_path / "second")
    unpack(entry, again, tmp_path / "records")
    assert gather(request, entry, again) == gather(request, entry, Store(tmp_path / "first"))
    told = page(request, again)
    assert told.startswith("1 of 1 tasks are recorded with all contestants and 1 seeds.")
    assert "digits-mlp" in told


def test_an_edited_program_is_another_request(tmp_path: Path) -> None:
    program, found = tmp_path / "waves.py", []
    text = (
        "import torch\nfrom torch import nn\nfrom imstep.tasks import ExampleTask, held_out\n"
        "x = torch.linspace(-1, 1, 20)[:, None]\n"
        "load, model = lambda data: held_out(x, x), lambda: nn.Linear(1, 1)\n"
        "task = ExampleTask('waves', 'A wave', '20 points.', load, model, nn.MSELoss())\n"
    )
    for more in ("", "# another\n"):
        program.write_text(text + more)
        work._digests.cache_clear()
        entry = Entry(str(program), budget=2.0, sides=())
        found.append(Job(entry, OWN, entry.contestants()[0].spec.name, "seed-0", {}, 0, entry.limits))
        record = perform(found[-1])
        Store(tmp_path / f"bench{len(found)}").keep(found[-1], record)
    assert Store(tmp_path / "bench2").find(found[1]) is not None
    with pytest.raises(RunDirectoryError, match="made with files"):
        Store(tmp_path / "bench1").find(found[0])


def test_muon_moves_weights_by_muon_and_the_rest_by_adamw() -> None:
    torch.manual_seed(0)
    filters, matrix, bias = (torch.nn.Parameter(torch.randn(s)) for s in ((4, 2, 3, 3), (4, 18), (4,)))
    with torch.no_grad():
        matrix.copy_(filters.flatten(1))
    before = bias.detach().clone()
    ours = MuonAndAdamW([filters, bias], lr=0.1, weight_decay=0.01)
    reference = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(2):
        ours.zero_grad()
        filters.sin().sum().backward()
        (bias * torch.arange(1.0, 5.0)).sum().backward()
        matrix.grad = matrix.detach().cos()
        ours.step()
        reference.step()
    torch.testing.assert_close(filters.detach().flatten(1), matrix.detach())
    torch.testing.assert_close(bias.detach(), before * (1 - 1e-3) ** 2 - 0.2, rtol=0, atol=2e-3)


def test_the_list_tells_ranges_and_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = imstep_command("digits-autoencoder", "--list")
    assert result.exit_code == 0
    assert "hours" in result.output
    assert "lbfgs: L-BFGS; history 5 to 300" in result.output
    assert imstep_command("digits-autoencodr", "--list").exit_code == 2
