"""`imstep compare` and `imstep demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from imstep.runs.compare import DEFAULT_BUDGET
from imstep.runs.contestants import DEFAULT_OPTIMIZERS
from imstep.runs.studies import ComparisonRequest, run_comparison

__all__ = ["compare", "demo"]


def compare(
    task: Annotated[str, typer.Argument(help=TASK, autocompletion=complete_task)],
    optimizers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", autocompletion=complete_optimizer,
            help="Who takes part; the first is measured against the others. Default: the one that suits the task best, "
            f"adam, lbfgs. Names: {NAMES}.",
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help=f"Gradient-equivalents for each; default: the task's, or {DEFAULT_BUDGET:g}.")
    ] = None,
    tune: Annotated[bool, typer.Option(help="Choose learning rates by a sweep at the full budget.")] = True,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per step for all; default: the full batch.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the common initial weights; a table's split.")] = 0,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; default runs/compare-TASK-TIME.")
    ] = None,
    data: Data = None,
    examples: Examples = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    target: Target = None,
    kind: Kind = None,
    drop: Drop = None,
    impute: Impute = False,
    hidden: Hidden = None,
) -> None:
    """Train by several optimizers from the same start at the same cost; write a report."""
    names = None if optimizers is None else [name.strip() for name in optimizers.split(",") if name.strip()]
    with explained():
        request = ComparisonRequest(
            task, names, budget, seed, batch_size, threads, data, examples, device, tune=tune, dtype=dtype,
            table=table_options(target, kind, drop, impute, hidden),
        )  # fmt: skip
        done = run_comparison(request, out or dated(f"compare-{Path(task).name}"), terminal(), overwrite=overwrite)
    if not done:
        raise typer.Exit(130)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report; an earlier one is replaced.")] = Path(
        "demo"
    ),
    # A network this small gains little from a second thread, and slows many times where cores are shared.
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """The main job: compare on the digits autoencoder, one to two minutes."""
    names = (DEFAULT_OPTIMIZERS[0], "newton-krylov-batches", *DEFAULT_OPTIMIZERS[1:])
    request = ComparisonRequest("digits-autoencoder", names, budget=200.0, threads=threads)
    with explained():
        done = run_comparison(request, out, terminal(), overwrite=True)
    if not done:
        raise typer.Exit(130)
