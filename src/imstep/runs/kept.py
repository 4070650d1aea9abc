"""Weights of a run at several steps: kept while it trains, found again afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from imstep.runs.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from imstep.runs.rows import LogRow, StepRow, TrainingError
from imstep.runs.rundir import RunDirectory
from imstep.runs.runner import Trainer

__all__ = ["Keeper", "Weights", "every", "kept_steps", "weights"]

FOLDER = "weights"
"""Folder of a run directory, with one checkpoint of the model alone for each kept step."""

Weights = dict[str, Tensor]


def every(text: str, option: str) -> int:
    """The number of steps in words such as "every=50", or "50".

    Raises:
        TrainingError: it is none.
    """
    found = re.fullmatch(r"(?:every=)?(\d+)", text.strip())
    if found is None or int(found[1]) < 1:
        raise TrainingError(f"{option} {text}: write every=N, such as every=50, with a whole number of steps above 0.")
    return int(found[1])


@dataclass(frozen=True)
class Keeper:
    """An observer that writes the model's weights into the run directory every so many steps.

    Args:
        run: where to.
        every: steps, >= 1.
    """

    run: RunDirectory
    every: int

    def __call__(self, trainer: Trainer, row: LogRow) -> None:
        if not isinstance(row, StepRow) or row.step % self.every:
            return
        folder = self.run.path / FOLDER
        folder.mkdir(exist_ok=True)
        state = {"model": trainer.problem.model.state_dict()}
        write_checkpoint(folder / str(row.step), state, run=self.run.config.identity)


def kept_steps(run: RunDirectory) -> list[int]:
    """The steps whose weights can be had again: 0, those that were kept, and the last that was saved."""
    folder = run.path / FOLDER
    found = {int(path.name) for path in folder.iterdir() if path.name.isdecimal()} if folder.is_dir() else set()
    return sorted({0, *found, _last(run)})


def weights(run: RunDirectory, trainer: Trainer, steps: list[int]) -> Iterator[Weights]:
    """The model's state at each of the steps, read one after the other.

    Args:
        run: the run.
        trainer: freshly built from its config, which is what step 0 is.

    Raises:
        CheckpointError: a step was not kept; lists those that were.
    """
    there = kept_steps(run)
    for step in steps:
        if step not in there:
            raise CheckpointError(
                f"the weights of step {step} are not kept in {run.path}. There are steps {', '.join(map(str, there))}; "
                "imstep train --keep every=N keeps more."
            )
    initial = {name: tensor.clone() for name, tensor in trainer.problem.model.state_dict().items()}
    return (initial if step == 0 else _read(run, step) for step in steps)


def _read(run: RunDirectory, step: int) -> Weights:
    folder = run.path / FOLDER / str(step)
    place = folder if folder.exists() else run.path / "checkpoint"
    return read_checkpoint(place, run=run.config.identity)["model"]


def _last(run: RunDirectory) -> int:
    parts = read_checkpoint(run.path / "checkpoint", run=run.config.identity)
    return int(parts["trainer"]["totals"]["steps"])
