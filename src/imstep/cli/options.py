"""Options that several commands share, and what the shell completes them to."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

from imstep.cli.terminal import terminal
from imstep.complexstep import UnsupportedOperatorError
from imstep.curvature import NoResidualsError
from imstep.curvature.processes import OtherProcessError, ProcessesLostError
from imstep.runs.checkpoint import CheckpointError
from imstep.runs.optimizers import METHODS, OPTIMIZERS, OptimizerError
from imstep.runs.rows import TrainingError
from imstep.runs.rundir import RunDirectoryError
from imstep.tasks import TASKS, TableOptions, TaskError

_EXPECTED = (
    CheckpointError, NoResidualsError, OSError, OptimizerError, OtherProcessError, ProcessesLostError,
    RunDirectoryError, TaskError, TrainingError, UnsupportedOperatorError,
)  # fmt: skip
_FILES = {".py", ".csv", ".tsv", ".npz", ".parquet"}


def complete_task(incomplete: str) -> list[str]:
    """Tasks of that beginning, and files that can define one."""
    path = Path(incomplete)
    folder = path if incomplete.endswith("/") else path.parent
    files = [
        f"{entry}/" if entry.is_dir() else str(entry)
        for entry in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if (entry.is_dir() or entry.suffix in _FILES) and not entry.name.startswith((".", "__"))
    ]
    return [name for name in [*TASKS, *files] if name.startswith(incomplete)]


def complete_optimizer(incomplete: str) -> list[str]:
    """Optimizers of that beginning; of a list, the last."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in (*OPTIMIZERS, *METHODS) if name.startswith(last)]


NAMES = f"{', '.join(OPTIMIZERS)}; known methods: {', '.join(METHODS)}"
TASK = "A task of `imstep tasks`; or your own: problem.py[:NAME], MODULE:NAME, data.csv, .tsv, .npz, .parquet."

Target = Annotated[
    str | None, typer.Option(help="Of a table: the column to predict.", rich_help_panel="Tables (CSV, NPZ, Parquet)")
]
Kind = Annotated[
    str | None,
    typer.Option(
        help="Of a table: regression or classification; default: as the target tells.",
        rich_help_panel="Tables (CSV, NPZ, Parquet)",
        autocompletion=lambda: ["regression", "classification"],
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(help="Of a table: a column not to use; repeat it.", rich_help_panel="Tables (CSV, NPZ, Parquet)"),
]
Impute = Annotated[
    bool,
    typer.Option(
        "--impute", help="Of a table: fill missing values.", rich_help_panel="Tables (CSV, NPZ, Parquet)"
    ),
]
Hidden = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...", help="Of a table: widths of hidden layers; default 64,64.",
        rich_help_panel="Tables (CSV, NPZ, Parquet)",
    ),
]  # fmt: skip
Device = Annotated[str, typer.Option(help="For example cpu or cuda:0.")]
Dtype = Annotated[
    str, typer.Option(help="float32 or float64.", autocompletion=lambda: ["float32", "float64"])
]
Data = Annotated[Path | None, typer.Option(help="Folder that holds the data set.")]
Examples = Annotated[int | None, typer.Option(help="Train on the first so many examples only.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: as torch chooses.")]


def table_options(
    target: str | None, kind: str | None, drop: list[str] | None, impute: bool, hidden: str | None
) -> TableOptions | None:
    """What was asked of a table; None if nothing was."""
    try:
        widths = TableOptions.hidden if hidden is None else tuple(int(word) for word in hidden.split(",") if word)
    except ValueError as error:
        raise TaskError(f"--hidden {hidden}: give whole numbers such as 64,64.") from error
    asked = TableOptions(target, kind, tuple(drop or ()), impute, widths)
    return None if asked == TableOptions() else asked


def dated(name: str) -> Path:
    """A new folder below runs/ for something of that name."""
    word = re.sub(r"[^\w.+-]+", "-", name).strip("-")
    return Path("runs") / f"{word}-{datetime.now():%Y%m%d-%H%M%S}"


def _full(error: Exception) -> bool:
    """Whether a disk, or one's share of it, is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explained() -> Iterator[None]:
    """Errors of use as one line instead of a traceback; bugs keep theirs."""
    console = terminal(stderr=True)
    try:
        yield
    except _EXPECTED as error:
        # What happened elsewhere is told there, and by the first of several processes.
        if not isinstance(error, OtherProcessError) or os.environ.get("RANK", "0") == "0":
            room = ". What was saved before is kept: make room, and go on from there" if _full(error) else ""
            console.print(f"error: {error}{room}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = f"there is not enough memory ({str(error).splitlines()[0]})" if str(error) else "memory is used up"
        remedy = "Take fewer examples or points, smaller batches, or a smaller network."
        console.print(f"error: {reason}. {remedy}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        console.print("stopped at once; what was saved before is kept.")
        raise typer.Exit(130) from error
