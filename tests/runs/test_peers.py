"""A run in two processes: the numbers of one, one folder, and an end that all come to together."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from imstep.cli import app
from tests.launching import Outcomes, launch

PROGRAM = """
import os, signal, torch
from torch import nn
from imstep.tasks import Batch, Condition, ExampleTask, PhysicsTask

class Net(nn.Module):
    def __init__(self, fail=lambda at: None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.fail, self.calls = fail, 0

    def forward(self, x):
        self.calls += 1
        if os.environ.get("RANK") == "1" and self.training:
            self.fail(self.calls)
        return self.layers(x)

def broken(at):
    if at == 9:
        raise ZeroDivisionError("no such thing")

def interrupted(at):
    if at == 9:
        os.kill(os.getpid(), signal.SIGINT)

def examples(folder):
    x = torch.linspace(-1, 1, 22).reshape(11, 2)
    return Batch(x, x.prod(1, keepdim=True)), Batch(x[:3], x[:3, :1])

task = lambda name, **options: ExampleTask(name, "", "", examples, lambda: Net(**options), nn.MSELoss())
plain, raises, stops = task("plain"), task("raises", fail=broken), task("stops", fail=interrupted)
draw = lambda count, generator: torch.rand(count, 2, generator=generator).double()
conditions = (
    Condition("inside", lambda u, x: u(x) - x.sin(), draw, 7),
    Condition("start", lambda u, x: u(x), lambda count, generator: torch.zeros(count, 2).double(), 1, weight=3.0),
)
physics = PhysicsTask("physics", "", "", Net, conditions)
fixed = PhysicsTask("fixed", "", "", Net, conditions, redrawn=False)
"""
LIKE = ["--dtype", "float64", "--threads", "1"]
COMMANDS = {
    "plain": ["train", "problem.py:plain", "-O", "kronecker=0", "--epochs", "2"],
    "batches": ["train", "problem.py:plain", "-o", "newton-krylov-batches", "--batch-size", "5", "--epochs", "3"],
    "physics": ["train", "problem.py:physics", "-o", "newton-cg", "--epochs", "3"],
    "squares": ["train", "problem.py:physics", "-o", "least-squares", "-O", "recall=0.5", "--epochs", "3"],
    "checked": ["train", "problem.py:fixed", "-o", "least-squares", "--epochs", "2"],
    "ends": ["train", "problem.py:stops", "-o", "least-squares", "--epochs", "999"],
    "balanced": ["train", "problem.py:physics", "-o", "least-squares", "-O", "balance=1"],
    "seconds": ["train", "problem.py:plain", "--seconds", "0.01"],
    "raises": ["train", "problem.py:raises", "--epochs", "9"],
    "stops": ["train", "problem.py:stops", "--epochs", "999"],
    "adam": ["train", "problem.py:plain", "-o", "adam"],
    "nothing": ["train", "problem.py:nothing"],
    "compare": ["compare", "problem.py:plain"],
}


def command(folder: Path, out: str, words: list[str]) -> tuple[int, str]:
    os.chdir(folder)
    sys.modules["imstep.runs.run_report"] = None  # type: ignore[assignment]  # pictures take longer than the runs
    given = words if words[0] != "train" or "--resume" in words else [*words, *LIKE, "--out", out]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split()) or repr(result.exception)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    (folder / "problem.py").write_text(PROGRAM)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> Outcomes:
    def commands(rank: int) -> dict[str, tuple[int, str]]:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        found = {name: command(folder, f"two-{name}", words) for name, words in COMMANDS.items()}
        found["longer"] = command(folder, "", ["train", "--resume", "two-batches", "--epochs", "4"])
        return found

    return launch(2, commands)["commands"]


@pytest.fixture(autouse=True)
def here() -> Iterator[None]:
    before = Path.cwd()
    yield
    os.chdir(before)
    sys.modules.pop("imstep.runs.run_report", None)


@pytest.mark.parametrize("name", ["plain", "batches", "physics", "squares", "checked"])
def test_the_numbers_are_those_of_one_process(folder: Path, two: Outcomes, name: str) -> None:
    longer = COMMANDS[name] if name != "batches" else [*COMMANDS[name], "--epochs", "4"]
    code, said = command(folder, f"one-{name}", longer)
    assert code == 0, said
    found, expected = rows(folder / f"two-{name}"), rows(folder / f"one-{name}")
    assert [row["kind"] for row in found] == [row["kind"] for row in expected]
    for ours, alone in zip(found, expected, strict=True):
        # By chance least squares evaluates a closure once more, to see that its loss is no old one.
        for number in ("loss", "train_loss", "heldout_loss", *["cost"] * ("least-squares" not in longer)):
            assert ours.get(number, 0) == pytest.approx(alone.get(number, 0), rel=1e-9, abs=1e-12)
        for number in ("check_loss", "new_check_loss"):
            seen, wanted = (row.get("record", {}).get(number) or 0 for row in (ours, alone))
            assert seen == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", ["plain", "squares"])
def test_a_run_of_two_processes_goes_on_in_one(folder: Path, two: Outcomes, name: str) -> None:
    code, said = command(folder, "", ["train", "--resume", f"two-{name}", "--epochs", "4"])
    assert code == 0, said
    assert rows(folder / f"two-{name}")[-1]["step"] == 4


def test_the_first_alone_speaks(two: Outcomes) -> None:
    first, second = two
    for name in ("plain", "batches", "physics", "squares", "checked", "seconds", "longer"):
        assert first[name][0] == second[name][0] == 0, (first[name], second[name])
        assert "2 processes" in first[name][1]
        assert second[name][1] == "None"


def test_an_interruption_of_one_saves_for_all(folder: Path, two: Outcomes) -> None:
    first, second = two
    for name in ("stops", "ends"):
        assert first[name][0] == second[name][0] == 130, (first[name], second[name])
        assert f"Go on with: torchrun --nproc-per-node 2 -m imstep train --resume two-{name}" in first[name][1]
        assert (folder / f"two-{name}" / "checkpoint" / "manifest.json").exists()


def test_what_fails_in_one_ends_all(two: Outcomes) -> None:
    first, second = two
    assert first["raises"][0] == 2
    assert "process 1 of 2 failed" in first["raises"][1]
    assert "ZeroDivisionError: no such thing" in first["raises"][1]
    assert second["raises"][0] == 1
    assert "no such thing" in second["raises"][1]


def test_what_is_refused_is_said_once(folder: Path, two: Outcomes) -> None:
    first, second = two
    assert "adam trains in one process, and torchrun has started several" in first["adam"][1]
    assert "balance weights the terms of one process's loss" in first["balanced"][1]
    assert "has no 'nothing'" in first["nothing"][1]
    assert "imstep compare runs in one process" in first["compare"][1]
    for name in ("adam", "balanced", "nothing", "compare"):
        assert first[name][0] == 2
        assert second[name] == (2, "SystemExit(2)")
    assert not (folder / "two-adam").exists()
