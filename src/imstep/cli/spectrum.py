"""`imstep spectrum`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from imstep.cli.options import (
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
    complete_task,
    dated,
    explained,
    table_options,
)
from imstep.cli.terminal import terminal
from imstep.runs.config import RunConfig
from imstep.runs.matrices import MATRICES
from imstep.runs.rows import TrainingError
from imstep.runs.spectra import Questions
from imstep.runs.spectrum import SpectrumRequest, run_spectrum
from imstep.tasks import TASKS, find_task

__all__ = ["spectrum"]

_OF_A_RUN = ("seed", "device", "dtype", "threads", "data", "examples", "target", "kind", "drop", "impute", "hidden")


def spectrum(
    ctx: typer.Context,
    subject: Annotated[
        str,
        typer.Argument(
            metavar="TASK|RUN", autocompletion=complete_task,
            help=f"A run directory, or a problem at its initial weights: {TASK[0].lower()}{TASK[1:]}",
        ),
    ],
    of: Annotated[
        str, typer.Option(help=f"{', '.join(MATRICES)}.", autocompletion=lambda: list(MATRICES))
    ] = MATRICES[0],
    by: Annotated[
        str | None,
        typer.Option(help="layer or parameter: trace and largest eigenvalue of each, too."),
    ] = None,
    at: Annotated[str, typer.Option(help="Of a run: all kept steps, last, or steps such as 0,50,100.")] = "all",
    k: Annotated[int, typer.Option("--eigenvalues", "-k", help="How many, of largest magnitude.")] = Questions.k,
    tol: Annotated[float, typer.Option(help="Their residuals, relative to the largest.")] = Questions.tol,
    steps: Annotated[int, typer.Option(help="Lanczos steps of the density.")] = Questions.steps,
    probes: Annotated[int, typer.Option(help="Random vectors of the density.")] = Questions.probes,
    rtol: Annotated[float, typer.Option(help="Error of the trace, relative.")] = Questions.rtol,
    seed: Annotated[int, typer.Option(help="Decides initial weights and random vectors; a table's split.")] = 0,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; default runs/spectrum-NAME-TIME.", show_default=False)
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
    """Eigenvalues, their density and the trace of a loss's curvature; of a run at several steps. Ctrl-C, then the same
    command with --out FOLDER, goes on."""
    with explained():
        questions = Questions(of, by, k, tol, steps, probes, rtol, seed)
        words = _words(ctx)
        if subject not in TASKS and Path(subject).is_dir():
            _refuse(ctx)
            request = SpectrumRequest(questions, run=Path(subject), at=at, words=words)
        else:
            if "at" in _given(ctx):
                raise TrainingError("--at says which steps of a run: of a task there are the initial weights only.")
            if "/" in subject and not Path(subject).suffix:
                raise TrainingError(f"there is no folder {subject}. Give a run directory, which imstep train writes.")
            table = table_options(target, kind, drop, impute, hidden)
            config = RunConfig(
                task=find_task(subject, table).name,
                optimizer="sgd",  # none is used; a problem is built as a run builds it
                seed=seed,
                epochs=1.0,
                device=device,
                dtype=dtype,
                threads=threads if threads is not None else torch.get_num_threads(),
                data=None if data is None else str(data),
                examples=examples,
                table=None if table is None else table.to_dict(),
            )
            request = SpectrumRequest(questions, config, words=words)
        done = run_spectrum(
            request, out or dated(f"spectrum-{Path(subject).name}"), terminal(), overwrite=overwrite
        )
    if not done:
        raise typer.Exit(130)


def _given(ctx: typer.Context) -> list[str]:
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _refuse(ctx: typer.Context) -> None:
    """A run has its own settings; saying otherwise is an error, not ignored."""
    wrong = [name for name in _given(ctx) if name in _OF_A_RUN and name != "seed"]
    if wrong:
        raise TrainingError(
            f"--{wrong[0]} cannot be given for a run: it is measured with the settings in its config.json."
        )


def _words(ctx: typer.Context) -> list[str]:
    """The arguments as they were given, but for where the report goes."""
    names = {"k": "--eigenvalues"}
    words = [str(ctx.params["subject"])]
    for name in _given(ctx):
        value = ctx.params[name]
        if name in ("subject", "out", "overwrite"):
            continue
        option = names.get(name, f"--{name.replace('_', '-')}")
        for item in value if isinstance(value, list | tuple) else [value]:
            words += [option] if item is True else [option, str(item)]
    return words
