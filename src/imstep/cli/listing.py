"""`imstep tasks` and `imstep new`."""

from __future__ import annotations

from collections.abc import Iterable
from shlex import quote
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from imstep.cli.options import TASK, Data, Drop, Hidden, Impute, Kind, Target, complete_task, explained, table_options
from imstep.cli.terminal import terminal
from imstep.runs.optimizers import METHODS, OPTIMIZERS, get_optimizer
from imstep.runs.suitability import REFUSALS, rehearse, suited
from imstep.tasks import TASKS, find_task
from imstep.tasks.templates import KINDS, write_program

__all__ = ["new", "tasks"]

FEW = 32
"""Examples that a method is tried on."""


def new(
    name: Annotated[str, typer.Argument(help="The file to write, with or without .py; never overwritten.")],
    kind: Annotated[
        str, typer.Option(help=f"{', '.join(KINDS)}.", autocompletion=lambda: list(KINDS))
    ] = KINDS[0],
) -> None:
    """Write a short program that defines a problem of your own, to be changed and trained."""
    console = terminal()
    with explained():
        file = write_program(name, kind)
    best = " -o least-squares --dtype float64" if kind == "pinn" else ""
    console.print(f"wrote {file}. Train it as it is, then change it where it is marked 1 to 4:", markup=False)
    console.print(f"  imstep train {quote(str(file))}{best}", markup=False, highlight=False, soft_wrap=True)


def tasks(
    task: Annotated[
        str | None,
        typer.Argument(help=f"Show one: its data, and who can train it. {TASK}", autocompletion=complete_task),
    ] = None,
    data: Data = None,
    target: Target = None,
    kind: Kind = None,
    drop: Drop = None,
    impute: Impute = False,
    hidden: Hidden = None,
) -> None:
    """List the tasks, the optimizers that suit each, and the optimizers' options."""
    console = terminal()
    if task is not None:
        with explained():
            origin = find_task(task, table_options(target, kind, drop, impute, hidden))
            problem = origin.task.build(data=data)
            console.print(f"[bold]{escape(origin.task.name)}[/]: {escape(origin.task.description)}")
            console.print(f"{problem.size:,} parameters, {problem.data}", highlight=False)
            for note in origin.task.notes:
                console.print(f"[yellow]note:[/] {escape(note)}")
            rows = []
            for name in dict.fromkeys([*suited(origin.task), *OPTIMIZERS, *METHODS]):
                # One step of a method on the full batch may take long; what it refuses are structures.
                size = FEW if name in METHODS and origin.task.has_batches else None
                try:
                    rehearse(get_optimizer(name), problem, size)
                    rows.append((name, "suits" if name in suited(origin.task) else "can train it"))
                except REFUSALS as error:
                    rows.append((name, f"refuses it: {error}"))
            console.print(_table("Optimizers, the best guess first", rows))
        return
    listed = [
        (found.name, f"{escape(found.description)}\n[dim]optimizers: {', '.join(suited(found))}[/]")
        for found in TASKS.values()
    ]
    console.print(_table("Tasks, and the optimizers that suit them (the best guess first)", listed))
    console.print(_table("Optimizers", [(name, escape(_describe(name))) for name in OPTIMIZERS]))
    methods = [(name, escape(_describe(name))) for name in METHODS]
    console.print(_table("Known methods by name (imstep.methods)", methods))
    console.print(
        "Your own problem: a program (imstep new NAME), or a table (imstep train data.csv --target COLUMN).",
        markup=False, highlight=False,
    )  # fmt: skip


def _table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _describe(name: str) -> str:
    spec = get_optimizer(name)
    options = ", ".join(f"{key}={value:g}" for key, value in spec.defaults.items())
    return f"{spec.description} Options: {options or 'none'}."
