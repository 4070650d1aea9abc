"""The command line: parsing only. What the commands do is in `imstep.runs`."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import typer
    from typer.core import TyperGroup

    from imstep.cli.terminal import terminal
except ImportError as error:  # pragma: no cover (the test environment has them)
    raise SystemExit(
        f"imstep's command line needs {error.name}, which is not installed: pip install 'imstep[cli]'"
    ) from error

import imstep
from imstep.cli.benching import bench
from imstep.cli.claiming import claims
from imstep.cli.comparing import compare, demo
from imstep.cli.listing import new, tasks
from imstep.cli.options import dated, explained
from imstep.cli.spectrum import spectrum
from imstep.cli.training import train
from imstep.curvature.processes import OtherProcessError
from imstep.runs.peers import launched
from imstep.runs.rows import TrainingError
from imstep.runs.studies import run_accuracy

__all__ = ["app", "main"]


class _Ordered(TyperGroup):
    """Lists commands in the order in which one needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    cls=_Ordered,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Second-order training of neural networks by the complex-step derivative.",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"imstep {imstep.__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def _main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand != "train" and launched():
        with explained():
            raise (TrainingError if int(os.environ["RANK"]) == 0 else OtherProcessError)(
                f"imstep {ctx.invoked_subcommand} runs in one process, and torchrun has started several. Start it "
                "without torchrun; imstep train is what runs in several."
            )


for _command in (demo, train, compare, bench, spectrum, claims, new, tasks):
    app.command()(_command)


@app.command()
def accuracy(
    out: Annotated[
        Path | None, typer.Option(help="Folder for figure and record; default runs/accuracy-TIME.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides weights, data and directions.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
) -> None:
    """Error of the complex step and of real differences over the step h."""
    with explained():
        run_accuracy(out or dated("accuracy"), terminal(), seed=seed, overwrite=overwrite)


def main() -> None:
    """Entry point of the `imstep` command. What a terminal or file cannot show is a question mark there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
