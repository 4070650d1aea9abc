"""The tasks that can be named on the command line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from imstep.tasks.base import Task, TaskError
from imstep.tasks.convection import convection_model, convection_points, uniform
from imstep.tasks.data import digits, fashion_mnist, reconstruction
from imstep.tasks.equations import EQUATIONS
from imstep.tasks.examples import ACCURACY, Batch, ExampleTask, Loader
from imstep.tasks.models import autoencoder, convolutional_classifier, mlp
from imstep.tasks.own import is_program, load_program
from imstep.tasks.suite import SUITE
from imstep.tasks.table_task import TableOptions, table_task
from imstep.tasks.tables import is_table

__all__ = ["TASKS", "Origin", "UnknownTaskError", "find_task", "get_task"]


class UnknownTaskError(TaskError):
    """There is no task of that name; the message lists those that there are."""


def _as_images(load: Loader, side: int, data: Path | None) -> tuple[Batch, Batch]:
    """Inputs of shape (k, side²) as (k, 1, side, side)."""
    train, heldout = load(data)
    return (
        Batch(train.inputs.reshape(-1, 1, side, side), train.targets),
        Batch(heldout.inputs.reshape(-1, 1, side, side), heldout.targets),
    )


_ALL = (
    ExampleTask(
        "digits-autoencoder",
        "Handwritten digits, autoencoder",
        "1,500 digits (8x8, scikit-learn); MLP 64-128-64-12-64-128-64, tanh; mean squared error.",
        partial(reconstruction, digits),
        partial(autoencoder, (64, 128, 64, 12)),
        nn.MSELoss(),
        image_shape=(8, 8),
    ),
    ExampleTask(
        "digits-mlp",
        "Handwritten digits, classification by an MLP",
        "1,500 digits (8x8, scikit-learn); tanh MLP 64-64-32-10; cross entropy.",
        digits,
        partial(mlp, (64, 64, 32, 10)),
        nn.CrossEntropyLoss(),
        ACCURACY,
        (8, 8),
    ),
    ExampleTask(
        "digits-cnn",
        "Handwritten digits, classification by a CNN",
        "1,500 digits (8x8, scikit-learn); two 3x3 convolutions (8, 16 channels), GELU; cross entropy.",
        partial(_as_images, digits, 8),
        partial(convolutional_classifier, 8, (8, 16), 32),
        nn.CrossEntropyLoss(),
        ACCURACY,
        (8, 8),
    ),
    ExampleTask(
        "fashion-autoencoder",
        "Fashion-MNIST, autoencoder",
        "60,000 pictures (28x28); MLP 784-128-32-128-784, tanh; mean squared error.",
        partial(reconstruction, fashion_mnist),
        partial(autoencoder, (784, 128, 32)),
        nn.MSELoss(),
        image_shape=(28, 28),
    ),
    ExampleTask(
        "fashion-mlp",
        "Fashion-MNIST, classification by an MLP",
        "60,000 pictures (28x28); tanh MLP 784-128-64-10; cross entropy.",
        fashion_mnist,
        partial(mlp, (784, 128, 64, 10)),
        nn.CrossEntropyLoss(),
        ACCURACY,
        (28, 28),
    ),
    ExampleTask(
        "fashion-cnn",
        "Fashion-MNIST, classification by a CNN",
        "60,000 pictures (28x28); two 3x3 convolutions (16, 32 channels), GELU; cross entropy.",
        partial(_as_images, fashion_mnist, 28),
        partial(convolutional_classifier, 28, (16, 32), 64),
        nn.CrossEntropyLoss(),
        ACCURACY,
        (28, 28),
    ),
    ExampleTask(
        "convection-sobol",
        "Convection equation at fixed Sobol points",
        "u_t + 30 u_x = 0, u(x, 0) = sin x, periodic; 2,000 + 128 + 100 points; tanh MLP 2-50-50-50-50-1; sum of the "
        "three mean squares. Held out: the squared relative L2 error of u.",
        convection_points,
        convection_model,
        nn.MSELoss(),
    ),
    ExampleTask(
        "convection-random",
        "Convection equation at fixed random points",
        "As convection-sobol, at uniformly distributed random points in place of Sobol points.",
        partial(convection_points, draw=uniform),
        convection_model,
        nn.MSELoss(),
    ),
)

@dataclass(frozen=True)
class Origin:
    """A task and what it depends on.

    Args:
        task: the task.
        name: by which it is found again from any folder.
        root: the folder that its files are below; None for imstep's own.
        files: its files so far: a program also has those that it has imported from beside it.
        programs: whether the files are programs, which can be kept and run again, or data.
    """

    task: Task
    name: str
    root: Path | None = None
    files: Callable[[], tuple[Path, ...]] = tuple
    programs: bool = False


TASKS: dict[str, Task] = {task.name: task for task in (*_ALL, *EQUATIONS, *SUITE)}


def get_task(name: str, table: TableOptions | None = None) -> Task:
    """The task that a name means.

    Args:
        name: of a task in `TASKS`; or a table (`data.csv`, `.tsv`, `.npz`, `.parquet`); or a program that defines a
            task (`problem.py`, `problem.py:name`, `package.module:name`).
        table: how a table becomes a task; for tables only.

    Raises:
        UnknownTaskError: there is none; names the nearest and lists all.
        TaskError: a table or a program that cannot be used; says why.
    """
    return find_task(name, table).task


def find_task(name: str, table: TableOptions | None = None, kept: Path | None = None) -> Origin:
    """The task that a name means, and the files that it depends on; see `get_task`.

    Args:
        kept: a folder with copies of a program's files, to be run in place of the originals.
    """
    if is_table(name):
        file = Path(os.path.abspath(name))
        return Origin(table_task(Path(name), table or TableOptions()), str(file), file.parent, lambda: (file,))
    if table is not None and table != TableOptions():
        raise TaskError(f"--target and its like are for tables such as data.csv; {name} is none.")
    if name in TASKS:
        return Origin(TASKS[name], name)
    if is_program(name):
        program = load_program(name, kept)
        _, colon, wanted = name.partition(".py:")
        by_file = name.endswith(".py") or bool(colon)
        full = str(program.file) + (f":{wanted}" if wanted else "") if by_file else name
        return Origin(program.task, full, program.root, program.files, programs=True)
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownTaskError(
        f"there is no task {name!r}.{hint} Tasks: {', '.join(TASKS)}. "
        "Own problems: a file that ends in .py, .csv, .tsv, .npz or .parquet."
    )
