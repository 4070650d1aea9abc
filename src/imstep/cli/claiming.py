"""`imstep claims`."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console

from imstep.claims.claim import Claim, Figure
from imstep.claims.registry import CLAIMS
from imstep.cli.options import explained
from imstep.cli.terminal import terminal
from imstep.runs.rows import TrainingError

__all__ = ["claims"]


def claims(
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"One of {', '.join(CLAIMS)}; repeat it for several.",
            autocompletion=lambda incomplete: [name for name in CLAIMS if name.startswith(incomplete)],
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Only tell what is claimed.")] = False,
) -> None:
    """Measure what the method's paper claims, each in seconds, on one thread; fail if a claim does."""
    console = terminal()
    with explained():
        chosen = [_claim(name) for name in only or CLAIMS]
    if show:
        for claim in chosen:
            console.print(f"[bold]{claim.name}[/]: {claim.words}; at length: {claim.further}", highlight=False)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        failed = [claim.name for claim in chosen if not _passes(claim, console)]
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        torch.set_num_threads(before)
    told = f"{len(chosen) - len(failed)} of {len(chosen)} claims pass"
    console.print(f"[bold]{told}{'; failed: ' + ', '.join(failed) if failed else ''}.[/]", highlight=False)
    if failed:
        raise typer.Exit(1)


def _claim(name: str) -> Claim:
    if name in CLAIMS:
        return CLAIMS[name]
    near = difflib.get_close_matches(name, CLAIMS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise TrainingError(f"there is no claim {name!r}.{hint} Claims: {', '.join(CLAIMS)}.")


def _passes(claim: Claim, console: Console) -> bool:
    """Measure, and print the outcome; an error is a failure."""
    start = time.perf_counter()
    figures: Sequence[Figure] = ()
    problem = ""
    with console.status(f"{claim.name}: {claim.words}"):
        try:
            figures = claim.check()
        except Exception as error:  # whatever goes wrong, the other claims are to be measured
            problem = f"{type(error).__name__}: {error}".split("\n")[0]
    passed = not problem and all(figure.met for figure in figures)
    mark = "[green]pass[/]" if passed else "[red]FAIL[/]"
    console.print(f"{mark} [bold]{claim.name}[/]: {claim.words} ({time.perf_counter() - start:.1f} s)", highlight=False)
    for figure in figures:
        console.print(f"     {'' if figure.met else 'missed: '}{figure}", markup=False, highlight=False, soft_wrap=True)
    if problem:
        console.print(f"     {problem}", markup=False, highlight=False, soft_wrap=True)
    if not passed:
        console.print(f"     at length: {claim.further}", markup=False, highlight=False)
    return passed
