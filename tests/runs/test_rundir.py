"""What is not a whole checkpoint of this run is refused by name, and nothing that exists is overwritten."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from imstep.runs import checkpoint as checkpoint_module
from imstep.runs.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from imstep.runs.config import RunConfig
from imstep.runs.files import write_atomically
from imstep.runs.rows import TrainingError
from imstep.runs.rundir import RunDirectory, RunDirectoryError
from imstep.runs.train import train

CONFIG = RunConfig("digits-mlp", "adam", epochs=2.0, examples=20, batch_size=10)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        train(CONFIG.build(), run)
    return tmp_path / "run"


def resume(path: Path) -> None:
    with RunDirectory.open(path) as run:
        run.restore(run.config.build())


def test_a_run_directory_holds_what_it_should(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "steps.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == [
        "evaluation",
        *["step"] * 2,
        "evaluation",
        *["step"] * 2,
        "evaluation",
    ]
    report = json.loads((finished / "report.json").read_text())
    assert report["ending"] == "epochs"
    assert report["totals"]["gradients"] == 4
    assert report["evaluation"] == rows[-1]
    assert RunConfig.from_dict(json.loads((finished / "config.json").read_text())["config"]) == CONFIG
    names = {path.name for path in finished.rglob("*")}
    assert not any(name.endswith((".pt", ".pkl", ".tmp")) for name in names)
    assert {"model.safetensors", "optimizer.safetensors", "optimizer.json", "trainer.safetensors"} <= names


def test_an_existing_directory_is_not_touched(finished: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match=r"exists and is not empty.*imstep train --resume"):
        RunDirectory.create(finished, CONFIG)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("\\documentclass")
    with pytest.raises(RunDirectoryError, match=r"Choose another --out\.$"):
        RunDirectory.create(tmp_path / "other", CONFIG)
    with pytest.raises(RunDirectoryError, match="cannot be used as a run directory"):
        RunDirectory.create(tmp_path / "other" / "thesis.tex", CONFIG)


def test_an_empty_directory_may_be_used(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, CONFIG).close()
    assert (tmp_path / "config.json").exists()


def cut(file: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        path = run / "checkpoint" / file
        path.write_bytes(path.read_bytes()[:-1])

    return damage


def flip(run: Path) -> None:
    path = run / "checkpoint" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def foreign_manifest(run: Path) -> None:
    (run / "checkpoint" / "manifest.json").write_text('{"model": "gpt"}')


def newer(run: Path) -> None:
    path = run / "checkpoint" / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))


def of_another_run(run: Path) -> None:
    other = replace(CONFIG, seed=9)
    with RunDirectory.create(run.with_name("another"), other) as another:
        train(other.build(), another)
    shutil.rmtree(run / "checkpoint")
    shutil.copytree(run.with_name("another") / "checkpoint", run / "checkpoint")


def cut_log(run: Path, end: int) -> None:
    file = run / "steps.jsonl"
    file.write_bytes(file.read_bytes()[:end])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated model": (cut("model.safetensors"), "model.safetensors is truncated or overwritten"),
    "truncated optimizer": (cut("optimizer.json"), "optimizer.json is truncated or overwritten"),
    "truncated manifest": (
        lambda run: (run / "checkpoint" / "manifest.json").write_text("{"),
        "manifest.json cannot be read",
    ),
    "changed bit": (flip, "was changed after writing"),
    "missing file": (lambda run: (run / "checkpoint" / "optimizer.safetensors").unlink(), "No such file"),
    "missing manifest": (
        lambda run: (run / "checkpoint" / "manifest.json").unlink(),
        "has no manifest.json: it is not an imstep checkpoint",
    ),
    "foreign manifest": (foreign_manifest, "is not the manifest of an imstep checkpoint"),
    "newer version": (newer, "has checkpoint version 99"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoint"), "no checkpoint to resume from"),
    "another run": (of_another_run, "is another run's checkpoint"),
    "torn line": (lambda run: cut_log(run, -5), r"steps\.jsonl, line \d+, is damaged"),
    "line without an end": (lambda run: cut_log(run, -1), r"steps\.jsonl, line \d+, is damaged"),
    "lost lines": (lambda run: (run / "steps.jsonl").write_text(""), "has 0 lines, the checkpoint"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused(finished: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    resume(finished)
    damage(finished)
    with pytest.raises(CheckpointError, match=message):
        resume(finished)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("{}", "is not the configuration of an imstep run"),
        ('{"format": "imstep-run", "version": 1}', "cannot be used"),
        ('{"format": "imstep-run", "version": 1, "config": {"task": "x"}}', "is missing"),
    ],
)
def test_a_foreign_config_is_refused(finished: Path, content: str, message: str) -> None:
    (finished / "config.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=message):
        RunDirectory.open(finished)


def test_no_run_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="holds no run"):
        RunDirectory.open(tmp_path / "absent")


def test_config_values_are_checked() -> None:
    with pytest.raises(TrainingError, match="'seed' is '1', expected int"):
        RunConfig.from_dict({**CONFIG.to_dict(), "seed": "1"})
    with pytest.raises(TrainingError, match="'momentum' is unknown"):
        RunConfig.from_dict({**CONFIG.to_dict(), "momentum": 1})
    with pytest.raises(TrainingError, match="training runs in float32 or float64"):
        replace(CONFIG, dtype="float16").build()
    with pytest.raises(TrainingError, match="device='gpu' cannot be used here"):
        replace(CONFIG, device="gpu").build()
    with pytest.raises(TrainingError, match="threads=0"):
        replace(CONFIG, threads=0).build()


def test_a_crash_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, {"a": {"n": 1}}, run="r")
    rename, calls = os.rename, []

    def dying(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(checkpoint_module.os, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, {"a": {"n": 2}}, run="r")
    monkeypatch.undo()
    assert read_checkpoint(folder, run="r") == {"a": {"n": 1}}
    write_checkpoint(folder, {"a": {"n": 3}}, run="r")
    assert read_checkpoint(folder, run="r") == {"a": {"n": 3}}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def refuse(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_change_of_machine_is_noticed(finished: Path) -> None:
    with RunDirectory.open(finished) as run:
        run.config.build()
        assert run.differences() == []
    path = finished / "config.json"
    content = json.loads(path.read_text())
    content["environment"]["PyTorch"] = "1.0"
    path.write_text(json.dumps(content))
    with RunDirectory.open(finished) as run:
        assert run.differences()[0].startswith("PyTorch was 1.0, is ")
