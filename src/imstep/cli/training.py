"""`imstep train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from imstep.cli.options import (
    NAMES,
    TASK,
    Data,
    Device,
    Drop,
    Dtype,
    Examples,
    Hidden,
    Impute,
    Kind,
    Target,
    Threads,
    complete_optimizer,
    complete_task,
    dated,
    explained,
    table_options,
)
from imstep.cli.terminal import terminal
from imstep.runs.config import RunConfig
from imstep.runs.kept import every
from imstep.runs.optimizers import OPTIMIZERS, OptimizerError, get_optimizer
from imstep.runs.peers import joined
from imstep.runs.rows import TrainingError
from imstep.runs.rundir import RunDirectory, RunDirectoryError
from imstep.runs.session import Manner, resume_run, start_run
from imstep.runs.watch import CurvatureWatch
from imstep.tasks import TASKS, Origin, TaskError, find_task

__all__ = ["train"]

DEFAULT_BUDGET = 200.0
DEFAULT_BATCH = 128
FULL_BATCH = ", ".join(spec.name for spec in OPTIMIZERS.values() if spec.full_batch)
FULL_BATCH_EVALUATION = 10.0
"""Epochs between evaluations when an epoch is one step; each costs two thirds of a gradient in time."""

_MAY_CHANGE_ON_RESUME = (
    "resume", "epochs", "budget", "seconds", "tensorboard", "save_every", "watch_curvature", "keep",
)  # fmt: skip


def train(
    ctx: typer.Context,
    task: Annotated[str | None, typer.Argument(help=TASK, autocompletion=complete_task)] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            "--optimizer", "-o", autocompletion=complete_optimizer,
            help=f"{NAMES}; or a first-order one by its class, such as torch.optim:RMSprop.",
        ),
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
            help=f"Stop after so many gradient-equivalents; without any limit the task's, or {DEFAULT_BUDGET:g}."
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds of training.")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|full",
            help=f"Examples per step. Default: full for {FULL_BATCH} and most known methods, else {DEFAULT_BATCH}.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides weights, order of the data, dropout; a table's split.")] = 0,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Run directory; default runs/TASK-OPTIMIZER-TIME.", show_default=False)
    ] = None,
    data: Data = None,
    examples: Examples = None,
    first_points: Annotated[
        int | None,
        typer.Option(metavar="N", help="Equations: N points a step at first, more once steps hold at their own only."),
    ] = None,
    evaluate_every: Annotated[
        float | None, typer.Option(help="Epochs between evaluations; default 1, full batch 10.")
    ] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 30.0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard scalars.")
    ] = False,
    watch_curvature: Annotated[
        str | None,
        typer.Option(metavar="every=N", help="Largest eigenvalue, trace and density of the Hessian every N steps."),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="every=N", help="Keep the weights of every Nth step, for imstep spectrum.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go on with the run in DIR; only limits may be given besides."),
    ] = None,
    target: Target = None,
    kind: Kind = None,
    drop: Drop = None,
    impute: Impute = False,
    hidden: Hidden = None,
) -> None:
    """Train a task, imstep's or your own. Ctrl-C finishes the step, saves, and says how to go on.

    Started by torchrun, as in `torchrun --nproc-per-node 4 -m imstep train TASK`, processes share out each batch.
    """
    limits: dict[str, Any] = {"epochs": epochs, "budget": budget, "seconds": seconds}

    def asked() -> tuple[Origin, RunConfig]:
        if task is None:
            raise TaskError(
                f"name a task to train, or give --resume DIR. Tasks: {', '.join(TASKS)}; or a file of your own."
            )
        table = table_options(target, kind, drop, impute, hidden)
        origin = find_task(task, table)
        size = _batch_size(batch_size, optimizer, origin.task.has_batches)
        if all(limit is None for limit in limits.values()):
            limits["budget"] = origin.task.budget or DEFAULT_BUDGET
        often = FULL_BATCH_EVALUATION if size is None else 1.0
        config = RunConfig(
            task=origin.name,
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
            evaluate_every=evaluate_every if evaluate_every is not None else often,
            first_points=first_points,
            table=None if table is None else table.to_dict(),
        )
        return origin, config

    with explained(), joined(device if resume is None else _device_of(resume)) as peers:
        manner = peers.together(
            lambda: Manner(
                terminal(quiet=not peers.first),
                tensorboard=tensorboard,
                save_every=save_every,
                watch=None if watch_curvature is None else CurvatureWatch(every(watch_curvature, "--watch-curvature")),
                keep=None if keep is None else every(keep, "--keep"),
            )
        )
        if resume is not None:
            peers.together(lambda: _refuse_settings(ctx))
            done = resume_run(resume, manner, peers=peers, **limits)
        else:
            origin, config = peers.together(asked)
            done = start_run(config, out or dated(f"{origin.task.name}-{optimizer}"), manner, origin, peers)
    if not done:
        raise typer.Exit(130)


def _device_of(run: Path) -> str:
    """The device of a run that goes on; any where there is none, which is told later."""
    try:
        return RunDirectory.open(run).config.device
    except RunDirectoryError:
        return "cpu"


def _refuse_settings(ctx: typer.Context) -> None:
    """A resumed run keeps its settings; saying otherwise is an error, not ignored."""
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if name not in _MAY_CHANGE_ON_RESUME and source is not None and source.name == "COMMANDLINE":
            shown = "TASK" if name == "task" else f"--{name.replace('_', '-')}"
            raise TrainingError(
                f"{shown} cannot be given with --resume: the run keeps the settings in its config.json. "
                "Only --epochs, --budget, --seconds, --save-every, --tensorboard, --watch-curvature and --keep may be "
                "given."
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
        if name in options:
            raise OptimizerError(f"--option {pair}: {name} is given twice{' (--lr)' if name == 'lr' else ''}.")
        try:
            options[name] = float(value)
        except ValueError as error:
            raise OptimizerError(f"--option {pair}: write NAME=NUMBER, for example momentum=0.9.") from error
    return options
