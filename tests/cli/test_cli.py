"""The commands do what they say, and what cannot be done is one line that says why."""

import errno
import io
import json
import os
import re
import runpy
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import imstep_command, refused
from typer.testing import Result

import imstep
from imstep.cli import main
from imstep.runs.optimizers import METHODS, OPTIMIZERS
from imstep.tasks import TASKS

SMALL = ["--examples", "40", "--threads", "1"]


def numbers(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
        if row.get("record"):
            row["record"].pop("seconds", None)
    return rows


def test_tasks_lists_everything() -> None:
    output = imstep_command("tasks").output
    assert all(name in output for name in (*TASKS, *OPTIMIZERS, *METHODS))


def test_version() -> None:
    assert imstep_command("--version").output.startswith(f"imstep {imstep.__version__} (torch ")


def test_the_package_is_the_command_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["imstep", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("imstep", run_name="__main__")
    assert capsys.readouterr().out.startswith(f"imstep {imstep.__version__}")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_files_that_cannot_hold_all_letters_are_written(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "argv", ["imstep", "tasks", "poisson-2d"])
    monkeypatch.setattr(sys, "stdout", shown)
    with pytest.raises(SystemExit, match="0"):
        main()
    shown.seek(0)
    assert "poisson-2d: -?u = 2" in shown.read()


@pytest.mark.usefixtures("no_pages")
@pytest.mark.filterwarnings("ignore:.*not recognised")  # a bias that meets a single row of its kind
@pytest.mark.parametrize("optimizer", ["least-squares", "lbfgs"])  # tests/runs resumes all
def test_train_then_extend(tmp_path: Path, optimizer: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    task = "convection-sobol" if optimizer == "least-squares" else "digits-mlp"
    train = ["train", task, "-o", optimizer, "--batch-size", "20", *SMALL]
    assert imstep_command(*train, "--epochs", "2", "--out", str(whole)).exit_code == 0
    first = imstep_command(*train, "--epochs", "1", "--out", str(parts))
    assert "all epochs done" in first.output
    second = imstep_command("train", "--resume", str(parts), "--epochs", "2")
    assert second.exit_code == 0, second.output
    assert numbers(parts) == numbers(whole)
    assert "nothing left to do" in imstep_command("train", "--resume", str(parts)).output


def test_the_summary_lists_uncharged_evaluations(tmp_path: Path) -> None:
    words = ["train", "digits-cnn", "-o", "sgd", "--lr", "0.05", "--batch-size", "full", *SMALL]
    result = imstep_command(*words, "--budget", "3", "--evaluate-every", "1", "--out", str(tmp_path / "r"))
    output = " ".join(result.output.split())
    assert "gradient-equivalents 3.0 (gradients 3, products 0, losses 0)" in output
    assert re.search(r"evaluations 4 \(not charged: [\d.]+ gradient-equivalents", output)
    assert "accuracy train" in output
    page = (tmp_path / "r" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=.https?:", page)
    config = json.loads((tmp_path / "r" / "config.json").read_text())["config"]
    assert config["options"] == {"lr": 0.05}
    assert config["batch_size"] is None


@pytest.mark.usefixtures("no_pages")
def test_defaults_follow_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for optimizer, size in (("adam", 128), ("lbfgs", None)):
        result = imstep_command("train", "digits-mlp", "-o", optimizer, "--seconds", "0.01", *SMALL)
        assert result.exit_code == 0, result.output
        (run,) = (tmp_path / "runs").glob(f"digits-mlp-{optimizer}-*")
        assert json.loads((run / "config.json").read_text())["config"]["batch_size"] == size


@pytest.mark.usefixtures("no_pages")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["train", "digits-mlp", "-o", "adam", "--epochs", "2", *SMALL, "--tensorboard"]
    assert imstep_command(*words, "--out", str(tmp_path / "r")).exit_code == 0
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("step/loss")]
    expected = [row["loss"] for row in numbers(tmp_path / "r") if row["kind"] == "step"]
    assert logged == pytest.approx(expected, rel=1e-6)
    assert "evaluation/heldout_loss" in events.Tags()["scalars"]


def test_tensorboard_that_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refused("train", "digits-mlp", "-o", "adam", "--tensorboard", "--out", str(tmp_path / "r"))
    assert "pip install 'imstep[tensorboard]'" in message
    assert not (tmp_path / "r").exists()


REFUSED = {
    "no task": ([], "name a task to train, or give --resume DIR"),
    "unknown task": (["digits-mpl"], "Did you mean 'digits-mlp'? Tasks: digits-autoencoder, "),
    "unknown optimizer": (["digits-mlp", "-o", "adma"], "Did you mean 'adam'? Optimizers: "),
    "unknown option": (
        ["digits-mlp", "-o", "adam", "-O", "mu=1"],
        "adam has no option 'mu'. Its options: lr=",
    ),
    "malformed option": (["digits-mlp", "-o", "adam", "-O", "beta1"], "write NAME=NUMBER"),
    "option twice": (["digits-mlp", "-o", "adam", "--lr", "1", "-O", "lr=2"], "lr=2: lr is given twice (--lr)"),
    "endless option": (["digits-mlp", "-O", "max_step_norm=inf"], "max_step_norm=inf: give a finite number"),
    "no optimizer yet": (["digits-mlp", "-o", "torch.optim:Optimizer"], "torch.optim:Optimizer refuses"),
    "sparse gradients": (["digits-mlp", "-o", "torch.optim:SparseAdam"], "does not support dense gradients"),
    "rate without use": (["digits-mlp", "-o", "sgd", "--lr", "-1"], "sgd refuses"),
    "batch size": (["digits-mlp", "-o", "adam", "--batch-size", "0"], "a whole number above 0, or full"),
    "epochs": (["digits-mlp", "-o", "adam", "--epochs", "0"], "epochs=0.0: give a number above 0"),
    "endless": (["digits-mlp", "-o", "adam", "--budget", "inf"], "budget=inf: give a number above 0"),
    "never": (["digits-mlp", "-o", "adam", "--evaluate-every", "0"], "evaluation every 0.0 epochs: give a number"),
    "seed": (["digits-mlp", "--seed", "9" * 20], "give a whole number below 2**63"),
    "dtype": (["digits-mlp", "-o", "adam", "--dtype", "half"], "float32 or float64"),
    "device": (["digits-mlp", "-o", "adam", "--device", "abacus"], "device='abacus' cannot be used here"),
    "threads": (["digits-mlp", "-o", "adam", "--threads", "0"], "threads=0: give at least one"),
    "many threads": (["digits-mlp", "-o", "adam", "--threads", "100000"], "and at most 1024"),
    "examples": (["digits-mlp", "-o", "adam", "--examples", "0"], "examples=0"),
    "data": (["fashion-mlp", "-o", "adam", "--data", "absent"], "apt-get install dataset-fashion-mnist"),
    "evaluations": (["digits-mlp", "-o", "adam", "--evaluate-every", "-1"], "every -1.0 epochs"),
    "saving": (["digits-mlp", "-o", "adam", "--save-every", "0"], "save_every=0.0"),
}


def test_a_loss_without_residuals_is_explained(tmp_path: Path) -> None:
    words = ["train", "digits-mlp", "-o", "least-squares", *SMALL, "--out", str(tmp_path / "run")]
    assert "not recognised as a sum of squares" in refused(*words)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_explained_and_writes_nothing(tmp_path: Path, case: str) -> None:
    words, message = REFUSED[case]
    assert message in refused("train", *words, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_network_beyond_memory_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def beyond(*args: Any, **options: Any) -> None:
        torch.empty(2**60)  # PyTorch's own error

    monkeypatch.setattr("imstep.tasks.base.Task.build", beyond)
    message = refused("train", "digits-mlp", "-o", "adam", "--out", str(tmp_path / "run"))
    assert "there is not enough memory" in message
    assert "a smaller network" in message
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("imstep.runs.rundir.write_checkpoint", full)
    message = refused("train", "digits-mlp", "-o", "adam", "--epochs", "1", *SMALL, "--out", str(tmp_path / "run"))
    assert "make room, and go on from there" in message


@pytest.mark.usefixtures("no_pages")
def test_limits_that_cannot_be_leave_a_run_as_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    imstep_command("train", "digits-mlp", "-o", "adam", "--epochs", "1", *SMALL, "--out", str(run))
    before = (run / "config.json").read_bytes()
    assert "budget=0.0: give a number above 0" in refused("train", "--resume", str(run), "--budget", "0")
    assert (run / "config.json").read_bytes() == before


def test_an_unknown_flag_names_the_nearest() -> None:
    result = imstep_command("train", "digits-mlp", "--optimiser", "adam")
    assert result.exit_code == 2
    assert "--optimizer" in result.output


@pytest.mark.usefixtures("no_pages")
def test_run_directories_are_guarded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "digits-mlp", "-o", "adam", "--epochs", "1", *SMALL, "--out", str(run)]
    assert imstep_command(*words).exit_code == 0
    assert "imstep train --resume" in refused(*words)
    assert "--lr cannot be given with --resume" in refused("train", "--resume", str(run), "--lr", "1")
    assert "TASK cannot be given with --resume" in refused("train", "digits-mlp", "--resume", str(run))
    assert "holds no run" in refused("train", "--resume", str(tmp_path / "absent"))
    model = run / "checkpoint" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    assert "truncated" in refused("train", "--resume", str(run))


def wait_for_steps(run: Path, steps: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    log = run / "steps.jsonl"
    while time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) > steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"{log} did not reach {steps} lines in {seconds} s")


def interrupted(run: Path, number: signal.Signals, *words: str) -> Result:
    """The command, to which a signal comes when it has made some steps."""

    def interrupt() -> None:
        wait_for_steps(run, 30)
        os.kill(os.getpid(), number)

    # Should the command end before, the signal means nothing.
    former, thread = signal.signal(number, lambda *_: None), threading.Thread(target=interrupt)
    thread.start()
    try:
        return imstep_command(*words, "--out", str(run))
    finally:
        thread.join()
        signal.signal(number, former)


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_an_interruption_saves_and_prints_the_command_that_resumes(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    whole, run = tmp_path / "whole", tmp_path / "my run"
    words = ["train", "digits-mlp", "-o", "adam", "--batch-size", "10", *SMALL]
    result = interrupted(run, number, *words, "--epochs", "1000000")
    assert result.exit_code == 130, result.output
    assert "Traceback" not in result.output
    assert "finishing this step" in result.output
    command = next(line for line in result.output.splitlines() if "--resume" in line)
    # The printed words are a command that works, here with a nearer end.
    done = max(row["step"] for row in numbers(run))
    epochs = str(-(-done // 4) + 3)
    resumed = imstep_command(*shlex.split(command)[1:], "--epochs", epochs)
    assert resumed.exit_code == 0, resumed.output
    assert imstep_command(*words, "--epochs", epochs, "--out", str(whole)).exit_code == 0
    assert numbers(run) == numbers(whole)
