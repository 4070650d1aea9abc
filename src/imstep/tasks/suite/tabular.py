"""Regression on tables of the DELVE collection, in the form in which the neural network library FANN ships them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from imstep.tasks.base import DataNotFoundError, Metric, TaskError
from imstep.tasks.examples import Batch, ExampleTask
from imstep.tasks.models import mlp

__all__ = ["TASKS", "read_fann"]

_DEBIAN_FOLDER = Path("/usr/share/doc/libfann-dev/examples/datasets")


def read_fann(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (k, n) and outputs (k, m), float64, of a file that begins with the numbers k, n and m.

    Raises:
        TaskError: it holds other than k (n + m) numbers, or something else.
    """
    try:
        numbers = np.array(file.read_text("ascii").split(), dtype=np.float64)
        k, n, m = (int(number) for number in numbers[:3])
        rows = numbers[3:].reshape(k, n + m)
    except (ValueError, UnicodeDecodeError) as error:
        raise TaskError(f"{file} is no whole table of FANN: {error}. Get it anew.") from error
    return rows[:, :n], rows[:, n:]


def _load(name: str, data: Path | None) -> tuple[Batch, Batch]:
    """Standardised by the training rows; both files as they are shipped."""
    folder = _folder(name, data)
    (inputs, targets), aside = (read_fann(folder / f"{name}.{part}") for part in ("train", "test"))
    told, wanted = ((values.mean(0), np.where(values.std(0) > 0, values.std(0), 1.0)) for values in (inputs, targets))
    train, heldout = (
        Batch(torch.from_numpy((x - told[0]) / told[1]), torch.from_numpy((y - wanted[0]) / wanted[1]))
        for x, y in ((inputs, targets), aside)
    )
    return train, heldout


def _folder(name: str, data: Path | None) -> Path:
    configured = os.environ.get("IMSTEP_DATA")
    folders = [data] if data is not None else [*([Path(configured)] if configured else []), _DEBIAN_FOLDER]
    for folder in folders:
        if all((folder / f"{name}.{part}").is_file() for part in ("train", "test")):
            return folder
    looked = ", ".join(map(str, folders))
    raise DataNotFoundError(
        f"the table {name} was not found: no {name}.train and {name}.test in {looked}. Get it by one of:\n"
        "  apt-get install libfann-doc                                    (Debian, Ubuntu)\n"
        "  apt-get download libfann-doc; dpkg -x libfann-doc*.deb FOLDER  then  --data "
        f"FOLDER{_DEBIAN_FOLDER}"
    )


def _task(name: str, file: str, inputs: int, rows: str, words: str) -> ExampleTask:
    widths = (inputs, 64, 64, 1)
    return ExampleTask(
        name, f"{name}: {words}", f"{rows} rows; tanh MLP {'-'.join(map(str, widths))}; mean squared error, "
        "standardised: a loss of 1 is the mean's.", partial(_load, file), partial(mlp, widths), nn.MSELoss(),
        Metric("explained variance", lambda outputs, targets: (outputs - targets).square().mean(1), lambda m: 1 - m),
        unit="rows", budget=500.0,
    )  # fmt: skip


TASKS = (
    _task("census-house", "census-house", 16, "11,392 + 11,392", "prices of houses in a region from its census"),
    _task("kin32fm", "kin32fm", 32, "2,048 + 2,048", "where the hand of a robot's arm is"),
    _task("abalone", "abelone", 10, "2,088 + 2,089", "ages of shells from their measures"),  # as the file is spelt
)
