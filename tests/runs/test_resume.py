"""An interrupted and resumed run gives the numbers of an uninterrupted one, bit for bit."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from imstep.runs.config import RunConfig, TrainingError
from imstep.runs.interrupt import Interrupt
from imstep.runs.optimizers import OPTIMIZERS
from imstep.runs.rows import Row
from imstep.runs.rundir import RunDirectory
from imstep.runs.runner import Trainer
from imstep.runs.train import train
from imstep.tasks import TaskError


def config_of(optimizer: str, batch_size: int | None, task: str | None = None, **settings: Any) -> RunConfig:
    values = {"epochs": 4.0, "seed": 1, "threads": 1, "examples": 60, **settings}
    task = task or ("convection-sobol" if optimizer == "least-squares" else "digits-mlp")
    return RunConfig(task, optimizer, batch_size=batch_size, **values)


def go(run: RunDirectory, trainer: Trainer, stop_after: int | None = None) -> None:
    """Train; a request to stop arrives during step `stop_after`."""
    interrupt = Interrupt()

    def watch(trainer: Trainer, row: Row) -> None:
        interrupt.requested = stop_after is not None and trainer.totals.steps >= stop_after

    train(trainer, run, observers=[watch], interrupt=interrupt)


def numbers(run: RunDirectory) -> list[dict[str, Any]]:
    """All rows without what a clock measured."""
    rows = run.rows()
    for row in rows:
        row.pop("seconds")
        if row.get("record") is not None:
            row["record"].pop("seconds", None)
    return rows


def in_two_parts(folder: Path, config: RunConfig, stop: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a run that was stopped and gone on with, and of one that was not."""
    with RunDirectory.create(folder / "whole", config) as run:
        go(run, config.build())
        expected = numbers(run)
    with RunDirectory.create(folder / "parts", config) as run:
        go(run, config.build(), stop)
    with RunDirectory.open(folder / "parts") as run:
        trainer = run.config.build()
        run.restore(trainer)
        go(run, trainer)
        return numbers(run), expected


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.problem.model.state_dict()


@cache
def uninterrupted(optimizer: str, batch_size: int | None) -> tuple[Trainer, list[dict[str, Any]]]:
    """The usual run, made once: where it ends, and its rows."""
    config = config_of(optimizer, batch_size)
    whole = config.build()
    with TemporaryDirectory() as folder, RunDirectory.create(Path(folder) / "whole", config) as run:
        go(run, whole)
        return whole, numbers(run)


@pytest.mark.parametrize("batch_size", [None, 25], ids=["full", "minibatch"])
@pytest.mark.parametrize("stops", [(0,), (1, 3)], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, optimizer: str, stops: tuple[int, ...], batch_size: int | None
) -> None:
    config = config_of(optimizer, batch_size)
    whole, expected = uninterrupted(optimizer, batch_size)
    trainer = config.build()
    with RunDirectory.create(tmp_path / "parts", config) as run:
        go(run, trainer, stops[0])
        assert trainer.ending is None
    for stop in (*stops[1:], None):
        torch.rand(11)  # a resumed process does not share the first one's generator
        run = RunDirectory.open(tmp_path / "parts")
        trainer = run.config.build()
        with run:
            run.restore(trainer)
            go(run, trainer, stop)
            found = numbers(run)
    assert trainer.ending is whole.ending
    assert found == expected
    one, two = weights(whole), weights(trainer)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert trainer.totals.cost == whole.totals.cost
    assert dict(trainer.totals.statuses) == dict(whole.totals.statuses)


def test_a_run_whose_points_grow_resumes(tmp_path: Path) -> None:
    """With 8 points a step of 160 the loss elsewhere soon leaves that at the points of the steps behind."""
    settings = {"first_points": 8, "dtype": "float64", "epochs": 14.0, "examples": 160}
    found, expected = in_two_parts(tmp_path, config_of("least-squares", None, "heat-1d", **settings), stop=10)
    assert found == expected
    points = [row["step_cost"] for row in expected if "step_cost" in row]
    assert points[-1] > 3 * points[0]
    with pytest.raises(TaskError, match="1 to 159 points"):
        config_of("least-squares", None, "heat-1d", first_points=161, examples=160).build()
    with pytest.raises(TrainingError, match="choose least-squares"):
        config_of("adam", None, "heat-1d", first_points=8, examples=160).build()
    with pytest.raises(TaskError, match="data, not points"):
        config_of("least-squares", None, "digits-mlp", first_points=8).build()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS.keys() - {"least-squares"}))
def test_a_convolutional_net_resumes_in_either_type(tmp_path: Path, optimizer: str, dtype: str) -> None:
    found, expected = in_two_parts(tmp_path, config_of(optimizer, None, "digits-cnn", epochs=3.0, dtype=dtype), stop=2)
    assert found == expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, optimizer: str) -> None:
    """Rows that were logged after the last checkpoint are made again, not doubled."""
    config = config_of(optimizer, 25)
    _, expected = uninterrupted(optimizer, 25)
    trainer = config.build()
    with RunDirectory.create(tmp_path / "killed", config) as run:
        for row in trainer.run(config.limits):
            run.append(row)
            if trainer.totals.steps == 3:
                run.save(trainer)
            if trainer.totals.steps == 7:
                break
    with (tmp_path / "killed" / "steps.jsonl").open("a") as file:
        file.write('{"kind": "st')  # the line being written when the power went
    with RunDirectory.open(tmp_path / "killed") as run:
        trainer = run.config.build()
        run.restore(trainer)
        assert trainer.totals.steps == 3
        go(run, trainer)
        assert numbers(run) == expected


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    short, long = config_of("adam", 25, epochs=2.0), config_of("adam", 25, epochs=5.0)
    with RunDirectory.create(tmp_path / "long", long) as run:
        go(run, long.build())
        expected = numbers(run)
    with RunDirectory.create(tmp_path / "short", short) as run:
        go(run, short.build())
    with RunDirectory.open(tmp_path / "short") as run:
        trainer = run.config.build()
        run.restore(trainer)
        run.extend(epochs=5.0)
        go(run, trainer)
        assert numbers(run) == expected
    assert RunDirectory.open(tmp_path / "short").config.epochs == 5


def test_when_checkpoints_are_written_changes_nothing(tmp_path: Path) -> None:
    config = config_of("lbfgs", None)
    found = []
    for name, save_every in (("often", 1e-9), ("seldom", 1e9)):
        with RunDirectory.create(tmp_path / name, config) as run:
            train(config.build(), run, save_every=save_every)
            found.append(numbers(run))
    assert found[0] == found[1]
