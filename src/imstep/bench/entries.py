"""What the bench trains: the usual list, and the full one, as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from imstep.bench.entry import ACCURACY, EXPLAINED, HELDOUT, PSNR, WRONG, Entry
from imstep.bench.sides import OWN, PUBLIC_SOAP, Range
from imstep.tasks import TaskError, get_task
from imstep.tasks.tables import is_table

__all__ = ["ENTRIES", "FULL", "entries_of", "entry_of"]


def entry_of(name: str, full: bool = False) -> Entry:
    """The entry of that name; or the usual one of any task: the full batch, the training loss, no weight decay.

    Args:
        name: of an entry or a task.
        full: whether as published, where an entry is shorter otherwise.

    Raises:
        TaskError: there is no such task.
    """
    known = _known(full)
    if name in known:
        return known[name]
    try:
        get_task(name)
    except TaskError as error:
        if not is_table(name):
            raise
        raise TaskError(
            f"{error} Here a table takes no options: give a program, table.py, with task = imstep.tasks.get_task"
            f"({str(Path(name).absolute())!r}, imstep.tasks.TableOptions(target=...)); or use imstep compare."
        ) from error
    return Entry(name)


def entries_of(name: str, full: bool = False) -> list[Entry]:
    """The entry of that name, or those that a pattern such as `shakespeare-gpt-*` fits.

    Raises:
        TaskError: there is none.
    """
    if "*" not in name:
        return [entry_of(name, full)]
    found = [entry for label, entry in _known(full).items() if fnmatchcase(label, name)]
    if not found:
        raise TaskError(f"no entry of the bench fits {name!r}. `imstep bench --list` names them.")
    return found


def _known(full: bool) -> dict[str, Entry]:
    """Some entries are in the full list alone, and can be named without asking for it."""
    return FULL if full else {**FULL, **ENTRIES}


_CONVECTION = {name: {"lr": Range(3e-4, 3e-2)} for name in ("soap", PUBLIC_SOAP, "kl-shampoo")}
_SYSTEMS = ("adamw", "soap", PUBLIC_SOAP, "lbfgs", "adam-lbfgs")
_RECURRENT = ("adam-clipped", "adam-orthogonal", "soap", PUBLIC_SOAP, "hessian-free", "lstm-adam")
_STATES = Range(0.3, 30.0)
"""Weights of the damping of hidden states, for our side, K-FAC and Hessian-free: all have as many trials."""
_PRODUCTS = Range(1, 32, whole=True)
"""Of a step of ours, tuned as the peers' rates are from batches of 256 on: how many pay depends on the batch. Smaller
ones have those of the configuration."""
_SWEEP = ("adamw", "muon", "soap", PUBLIC_SOAP)


def _recurrent(task: str, gradient: float, budget: float, trial: float, batch_size: int | None = 100) -> Entry:
    """1,000 sequences an epoch, drawn anew; that of 32 known ones by the full batch."""
    return Entry(
        task, budget=budget, trial=trial, batch_size=batch_size, measure=WRONG, target=0.01, until_solved=True,
        ours="newton-krylov", sides=_RECURRENT, gradient=gradient,
        ranges={side: {"structural": _STATES} for side in (OWN, "kfac", "hessian-free")},
    )  # fmt: skip


def _table(task: str, gradient: float) -> Entry:
    """Judged by what is held out."""
    others = ("sklearn-mlp", "sklearn-boosting")
    return Entry(task, budget=500, measure=EXPLAINED, decay=True, extra=others, gradient=gradient)


def _sweep(task: str, passes: Mapping[int, float], target: float, gradient: float) -> list[Entry]:
    """A task by batches of many sizes, each for as many passes over the examples, to one loss."""
    return [
        Entry(
            task, f"{task}-{size}", budget=budget, trial=budget / 2, batch_size=size, measure=HELDOUT, target=target,
            sides=_SWEEP, ranges={OWN: {"products": _PRODUCTS}} if size >= 256 else {}, gradient=gradient, sweep=task,
        )
        for size, budget in passes.items()
    ]  # fmt: skip


def _modular(task: str, budget: float, trial: float, gradient: float) -> Entry:
    return Entry(
        task, budget=budget, trial=trial, measure=ACCURACY, target=0.99, decay=True, sides=_SWEEP, gradient=gradient
    )


def _pictures(task: str, seconds: float, trial: float, gradient: float, examples: int | None = 10_000) -> Entry:
    return Entry(
        task, seconds=seconds, trial=trial, batch_size=128, measure=ACCURACY, decay=True, examples=examples,
        gradient=gradient, looks=10,
    )  # fmt: skip


_ALL = (
    Entry("digits-autoencoder", budget=600, gradient=0.006),
    Entry("fashion-autoencoder", budget=900, trial=400, examples=2000, gradient=0.045),
    Entry(
        "fashion-autoencoder", "fashion-autoencoder-batches", seconds=60, trial=40, batch_size=512, examples=20_000,
        measure=HELDOUT, decay=True, gradient=0.4,
    ),
    Entry(
        "digits-mlp", seconds=15, trial=200, batch_size=128, measure=ACCURACY, decay=True, gradient=0.006,
    ),
    Entry(
        "digits-cnn", seconds=30, trial=200, batch_size=512, measure=ACCURACY, decay=True, gradient=0.012,
    ),
    Entry("convection-sobol", budget=2000, ours="least-squares", ranges=_CONVECTION, target=1e-4, gradient=0.012),
    Entry("poisson-2d", budget=1000, target=1e-6, gradient=0.01),
    Entry("burgers", budget=1000, target=1e-5, gradient=0.02),
    Entry("wave", budget=1500, target=1e-4, gradient=0.02),
    Entry("curves-autoencoder", budget=80, trial=20, batch_size=500, examples=5000, gradient=0.6),
    Entry("curves-autoencoder", "curves-autoencoder-full", budget=150, trial=50, examples=2000, gradient=0.24),
    _recurrent("addition-80", 0.25, 350, 45),
    _recurrent("multiplication-80", 0.25, 350, 45),
    _recurrent("addition-150", 0.4, 350, 45),
    _recurrent("multiplication-150", 0.4, 350, 45),
    _recurrent("temporal-order-80", 0.25, 150, 40),
    _recurrent("memory-20bit-80", 0.3, 200, 45),
    _recurrent("memory-5bit-200", 0.06, 800, 150, None),
    Entry(
        "silverbox", budget=1200, trial=400, ours="least-squares", target=1.1e-4, dtype="float64", sides=_SYSTEMS,
        gradient=0.06,
    ),
    Entry(
        "wiener-hammerstein", budget=1500, trial=500, ours="least-squares", target=1.5e-4, dtype="float64",
        sides=_SYSTEMS, gradient=0.045,
    ),
    Entry("picture-sines", seconds=75, trial=100, measure=PSNR, gradient=0.2),
    Entry("picture-fourier", seconds=75, trial=100, measure=PSNR, gradient=0.2),
    _modular("modular-addition-59", 800, 400, 0.094),
    *_sweep("shakespeare-small", {16: 32, 64: 32, 256: 32, 1024: 64, 4096: 128}, 2.4, 0.7),
    _pictures("fashion-resnet8", 90, 1, 12.0),
    _pictures("fashion-mixer", 80, 1, 8.0),
    _table("census-house", 0.02),
    _table("kin32fm", 0.004),
    _table("abalone", 0.004),
    Entry("moons-flow", budget=1000, trial=300, gradient=0.011),
    Entry("gaussian-process", budget=500, trial=200, gradient=0.04),
    Entry("butane-forces", budget=1000, trial=300, gradient=0.006),
)  # fmt: skip
ENTRIES: dict[str, Entry] = {entry.label: entry for entry in _ALL}
"""The entries of the bench by name, each four hours at most."""


def _longer(label: str, **fields: Any) -> Entry:
    """The entry as published, or as long as a doubt needs."""
    return replace(ENTRIES[label], **fields)


_AT_LENGTH = (
    _longer("fashion-autoencoder", budget=1500, trial=600),
    _longer("wave", budget=2000),
    _longer("curves-autoencoder", budget=100, trial=50, batch_size=2000, examples=None, gradient=2.5),
    _longer("curves-autoencoder-full", budget=200, trial=50, examples=5000, gradient=0.6),
    *(
        replace(entry, budget=max(600, 2 * entry.budget), trial=150, sides=(*_RECURRENT, "kfac"))
        for entry in _ALL
        if entry.until_solved
    ),
    _longer("silverbox", budget=1500, trial=500),
    _longer("picture-sines", seconds=120, trial=150),
    _longer("picture-fourier", seconds=120, trial=150),
    _modular("modular-addition-97", 3000, 1500, 0.25),
    *_sweep("shakespeare-gpt", dict.fromkeys((16, 64, 256, 1024, 4096), 8), 1.9, 40.0),
    _pictures("fashion-resnet8", 300, 1, 120.0, None),
    _pictures("fashion-resnet20", 600, 1, 400.0, None),
    _pictures("fashion-mixer", 200, 2, 120.0, None),
)
FULL: dict[str, Entry] = {**ENTRIES, **{entry.label: entry for entry in _AT_LENGTH}}
"""The same and more by name, as published where an entry is shorter otherwise."""
