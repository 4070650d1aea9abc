"""The command line: parsing only. What the commands do is in `imstep.runs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from typer.core import TyperGroup
except ImportError as error:  # pragma: no cover (the test environment has them)
    raise SystemExit(
        f"imstep's command line needs {error.name}, which is not installed: pip install 'imstep[cli]'"
    ) from error

import imstep
from imstep.curvature import NoResidualsError
from imstep.runs.checkpoint import CheckpointError
from imstep.runs.compare import DEFAULT_BUDGET as COMPARISON_BUDGET
from imstep.runs.config import RunConfig
from imstep.runs.contestants import DEFAULT_OPTIMIZERS
from imstep.runs.optimizers import OPTIMIZERS, OptimizerError, get_optimizer
from imstep.runs.rows import TrainingError
from imstep.runs.rundir import RunDirectoryError
from imstep.runs.session import Manner, resume_run, start_run
from imstep.runs.studies import ComparisonRequest, run_accuracy, run_comparison
from imstep.tasks import TASKS, TaskError, get_task

__all__ = ["app", "main"]

DEFAULT_BUDGET = 200.0
DEFAULT_BATCH = 128
FULL_BATCH = ", ".join(spec.name for spec in OPTIMIZERS.values() if spec.full_batch)
FULL_BATCH_EVALUATION = 10.0
"""Epochs between evaluations when an epoch is one step; each costs two thirds of a gradient in time."""

_EXPECTED = (
    CheckpointError, NoResidualsError, OSError, OptimizerError, RunDirectoryError, TaskError, TrainingError
)  # fmt: skip
_MAY_CHANGE_ON_RESUME = ("resume", "epochs", "budget", "seconds", "tensorboard", "save_every")


class _Ordered(TyperGroup):
    """Lists commands in the order in which one needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    cls=_Ordered,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Second-order training of neural networks by the complex-step derivative.",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"imstep {imstep.__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    ctx: typer.Context,
    task: Annotated[str | None, typer.Argument(help="What to train; see `imstep tasks`.")] = None,
    optimizer: Annotated[
        str, typer.Option("--optimizer", "-o", help=", ".join(OPTIMIZERS))
    ] = "newton-krylov",
    lr: Annotated[float | None, typer.Option(help="Learning rate, where the optimizer has one.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", metavar="NAME=NUMBER", help="Another optimizer option."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Stop after so many passes over the data.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help=f"Stop after so many gradient-equivalents; {DEFAULT_BUDGET:g} if no limit is given."
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds of training.")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|full",
            help=f"Examples per step. Default: full for {FULL_BATCH}, else {DEFAULT_BATCH}.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides weights, order of the data, dropout.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: as torch chooses.")] = None,
    device: Annotated[str, typer.Option(help="For example cpu or cuda:0.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Run directory; default runs/TASK-OPTIMIZER-TIME.", show_default=False)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that holds the data set.")] = None,
    examples: Annotated[int | None, typer.Option(help="Train on the first so many examples only.")] = None,
    evaluate_every: Annotated[
        float | None, typer.Option(help="Epochs between evaluations; default 1, full batch 10.")
    ] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 30.0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard scalars.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go on with the run in DIR; only limits may be given besides."),
    ] = None,
) -> None:
    """Train a task. Ctrl-C finishes the step, saves, and says how to resume."""
    limits = {"epochs": epochs, "budget": budget, "seconds": seconds}
    with _explained():
        manner = Manner(Console(), tensorboard=tensorboard, save_every=save_every)
        if resume is not None:
            _refuse_settings(ctx)
            done = resume_run(resume, manner, **limits)
        else:
            if task is None:
                raise TaskError(f"name a task to train, or give --resume DIR. Tasks: {', '.join(TASKS)}.")
            size = _batch_size(batch_size, optimizer, get_task(task).has_batches)
            if all(limit is None for limit in limits.values()):
                limits["budget"] = DEFAULT_BUDGET
            config = RunConfig(
                task=task,
                optimizer=optimizer,
                options=_options(lr, option),
                seed=seed,
                **limits,
                batch_size=size,
                device=device,
                dtype=dtype,
                threads=threads if threads is not None else torch.get_num_threads(),
                data=None if data is None else str(data),
                examples=examples,
                evaluate_every=evaluate_every or (FULL_BATCH_EVALUATION if size is None else 1.0),
            )
            done = start_run(config, out or _dated(f"{task}-{optimizer}"), manner)
    if not done:
        raise typer.Exit(130)


def _refuse_settings(ctx: typer.Context) -> None:
    """A resumed run keeps its settings; saying otherwise is an error, not ignored."""
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if name not in _MAY_CHANGE_ON_RESUME and source is not None and source.name == "COMMANDLINE":
            shown = "TASK" if name == "task" else f"--{name.replace('_', '-')}"
            raise TrainingError(
                f"{shown} cannot be given with --resume: the run keeps the settings in its config.json. "
                "Only --epochs, --budget, --seconds, --save-every and --tensorboard may be given."
            )


def _batch_size(text: str | None, optimizer: str, has_batches: bool) -> int | None:
    if text is None:
        return None if get_optimizer(optimizer).full_batch or not has_batches else DEFAULT_BATCH
    if text == "full":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise TrainingError(f"--batch-size {text}: give a whole number above 0, or full.")


def _options(lr: float | None, pairs: list[str] | None) -> dict[str, float]:
    options = {} if lr is None else {"lr": lr}
    for pair in pairs or []:
        name, _, value = pair.partition("=")
        try:
            options[name] = float(value)
        except ValueError as error:
            raise OptimizerError(f"--option {pair}: write NAME=NUMBER, for example momentum=0.9.") from error
    return options


@app.command()
def compare(
    task: Annotated[str, typer.Argument(help="What to train; see `imstep tasks`.")],
    optimizers: Annotated[
        str, typer.Option(metavar="A,B,...", help="Who takes part; the first is measured against the others.")
    ] = ",".join(DEFAULT_OPTIMIZERS),
    budget: Annotated[float, typer.Option(help="Gradient-equivalents for each.")] = COMPARISON_BUDGET,
    tune: Annotated[bool, typer.Option(help="Choose learning rates by a sweep at the full budget.")] = True,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per step for all; default: the full batch.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the common initial weights.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: as torch chooses.")] = None,
    device: Annotated[str, typer.Option(help="For example cpu or cuda:0.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; default runs/compare-TASK-TIME.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that holds the data set.")] = None,
    examples: Annotated[int | None, typer.Option(help="Train on the first so many examples only.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
) -> None:
    """Train by several optimizers from the same start at the same cost; write a report."""
    names = [name.strip() for name in optimizers.split(",") if name.strip()]
    request = ComparisonRequest(
        task, names, budget, seed, batch_size, threads, data, examples, device, tune=tune
    )
    with _explained():
        done = run_comparison(request, out or _dated(f"compare-{task}"), Console(), overwrite=overwrite)
    if not done:
        raise typer.Exit(130)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report; an earlier one is replaced.")] = Path(
        "demo"
    ),
    # A network this small gains little from a second thread, and slows many times where cores are shared.
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """The main job: compare on the digits autoencoder, about a minute on two cores."""
    request = ComparisonRequest("digits-autoencoder", threads=threads)
    with _explained():
        done = run_comparison(request, out, Console(), overwrite=True)
    if not done:
        raise typer.Exit(130)


@app.command()
def accuracy(
    out: Annotated[
        Path | None, typer.Option(help="Folder for figure and record; default runs/accuracy-TIME.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides weights, data and directions.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
) -> None:
    """Error of the complex step and of real differences over the step h."""
    with _explained():
        run_accuracy(out or _dated("accuracy"), Console(), seed=seed, overwrite=overwrite)


@app.command()
def tasks() -> None:
    """List the tasks and the optimizers that there are."""
    console = Console()
    for title, rows in (
        ("Tasks", [(task.name, task.description) for task in TASKS.values()]),
        ("Optimizers", [(spec.name, _describe(spec.name)) for spec in OPTIMIZERS.values()]),
    ):
        table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def _describe(name: str) -> str:
    spec = get_optimizer(name)
    options = ", ".join(f"{key}={value:g}" for key, value in spec.defaults.items())
    return f"{spec.description} Options: {options or 'none'}."


def _dated(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of use as one line instead of a traceback; bugs keep theirs."""
    console = Console(stderr=True)
    try:
        yield
    except _EXPECTED as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        console.print("stopped at once; what was saved before is kept.")
        raise typer.Exit(130) from error


def main() -> None:
    """Entry point of the `imstep` command."""
    app()
