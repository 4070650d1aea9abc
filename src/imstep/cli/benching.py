"""`imstep bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from imstep.bench.entries import ENTRIES, FULL, entries_of
from imstep.bench.entry import Entry
from imstep.bench.request import FULL_TRIALS, SEEDS, TRIALS, BenchRequest, estimate, shortened
from imstep.bench.session import run_bench
from imstep.bench.sides import OWN, SIDES
from imstep.cli.options import complete_task, explained
from imstep.cli.terminal import terminal
from imstep.runs.rows import TrainingError
from imstep.runs.seconds import Seconds

__all__ = ["bench"]

SHORT_TASK = "digits-mlp"
SHORT_TRIALS = 2


def _complete(incomplete: str) -> list[str]:
    names = [name for name in FULL if name.startswith(incomplete)]
    return list(dict.fromkeys([*names, *complete_task(incomplete)]))


def bench(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK]...", autocompletion=_complete, show_default=False,
            help="Those that --list tells, also by a pattern such as 'fashion-*'; any task of `imstep tasks`, or a "
            "file of your own. Default: all of the list.",
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Gradient-equivalents of a run, in place of each task's own.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Or seconds of a run.")] = None,
    sides: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help=f"The peers; {OWN} always takes part. {', '.join(SIDES)}; or any optimizer of imstep train.",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help=f"Settings that each tries in tuning; {TRIALS}, with --full {FULL_TRIALS}.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help=f"How many runs of each, from seed 0 on; {len(SEEDS)}.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of runs and report; default runs/bench, gone on with if it is there.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="How many runs go side by side, each on one thread.")] = 1,
    clock: Annotated[
        Seconds,
        typer.Option(help="Seconds that the processor computes for a run, or those on the wall, one run at a time."),
    ] = Seconds.PROCESSOR,
    full: Annotated[
        bool, typer.Option("--full", help="As published: all tasks, more examples, longer runs, more trials.")
    ] = False,
    short: Annotated[
        bool, typer.Option("--short", help=f"In small: few examples, {SHORT_TRIALS} trials, one seed.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="Only tell tasks, contestants, ranges and hours.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; write the report of what is there.")] = False,
) -> None:
    """Tune many contestants alike on many tasks, run them from several seeds, and tell who wins where. Ctrl-C finishes
    what runs; the same command goes on."""
    console = terminal()
    with explained():
        if full and short:
            raise TrainingError("--full and --short ask for different things: give one of them.")
        named = tasks or ([SHORT_TASK] if short else list(FULL if full else ENTRIES))
        peers = None if sides is None else tuple(w for word in sides.split(",") if (w := word.strip()) and w != OWN)
        entries = list({entry.label: entry for name in named for entry in entries_of(name, full)}.values())
        entries = [shortened(entry) for entry in entries] if short else entries
        entries = [entry.asked(budget=budget, seconds=seconds, sides=peers, clock=clock) for entry in entries]
        request = BenchRequest(
            entries,
            trials if trials is not None else SHORT_TRIALS if short else FULL_TRIALS if full else TRIALS,
            range(seeds) if seeds is not None else SEEDS[:1] if short else SEEDS,
        )
        if show:
            _show(request, console)
            return
        folder = out or Path("runs") / ("bench-short" if short else "bench-full" if full else "bench")
        done = run_bench(request, folder, console, make=not report, jobs=jobs)
    if not done:
        raise typer.Exit(130)


def _show(request: BenchRequest, console: Console) -> None:
    """The tasks, who takes part with which ranges, and how long all of it takes."""
    table = Table(title="Tasks", title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    for name in ("task", "a run", "a trial", "batch", "judged by", "ours", "peers", "runs", "hours"):
        table.add_column(name)
    total = 0.0
    for entry in request.entries:
        contestants = entry.contestants()
        hours = sum(estimate(entry, side, None, request.trials, len(request.seeds)) for side in contestants) / 3600
        tuned = sum(bool(entry.ranges_of(side)) for side in contestants)
        runs = tuned * request.trials + len(contestants) * len(request.seeds)
        total += hours
        table.add_row(
            entry.label, _limit(entry), f"{entry.trial_limits.budget:g} eq.", str(entry.batch_size or "full"),
            entry.measure.title, contestants[0].spec.name, str(len(contestants) - 1), str(runs), f"{hours:.1f}",
        )  # fmt: skip
    console.print(table)
    for entry in request.entries if len(request.entries) == 1 else ():
        _show_sides(entry, console)
    console.print(
        f"{request.trials} trials for each that is tuned, {len(request.seeds)} seeds. About {total:.1f} hours of one "
        "core; --jobs 2 takes half as long on two.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _show_sides(entry: Entry, console: Console) -> None:
    for side in entry.contestants():
        ranges = ", ".join(f"{name} {chosen}" for name, chosen in entry.ranges_of(side).items()) or "its defaults"
        words = f"  {side.name}: {side.title}; {ranges}{', cosine' if side.cosine else ''}"
        console.print(words, highlight=False, markup=False, soft_wrap=True)


def _limit(entry: Entry) -> str:
    return f"{entry.budget:g} eq." if entry.seconds is None else f"{entry.seconds:g} s"
