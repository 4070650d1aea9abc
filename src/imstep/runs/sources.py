"""The files that a run's own problem is made from: their hashes, and copies that a resumed run goes on with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from imstep.runs.config import RunConfig
from imstep.runs.files import write_atomically
from imstep.runs.rows import TrainingError
from imstep.tasks import Origin
from imstep.tasks.tables import is_table

__all__ = ["COPIES", "Snapshot", "hashes", "keep", "origin_of", "snapshot"]

COPIES = "problem"
"""Folder of a run directory with the programs that its task is made from."""


Snapshot = Mapping[Path, tuple[str, bytes | None]]
"""Files -> SHA-256, and the content of those that are to be copied."""


def snapshot(origin: Origin) -> Snapshot:
    """A task's files as they are now; programs with their content."""
    found: dict[Path, tuple[str, bytes | None]] = {}
    for file in origin.files():
        content = file.read_bytes()
        found[file] = hashlib.sha256(content).hexdigest(), content if origin.programs else None
    return found


def keep(files: Snapshot, root: Path | None, run: Path) -> dict[str, str]:
    """Copy the programs below `root` into a run directory; the SHA-256 of every file by its path."""
    for file, (_, content) in files.items():
        if content is not None and root is not None:
            copy = run / COPIES / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(copy, content)
    return {str(file): digest for file, (digest, _) in files.items()}


def hashes(origin: Origin) -> dict[str, str]:
    """The files of a task and what they hold, for a record's list of versions."""
    return {str(file): f"SHA-256 {digest}" for file, (digest, _) in snapshot(origin).items()}


def origin_of(config: RunConfig, run: Path) -> tuple[Origin, list[str]]:
    """The task of a run that goes on, and what its reader should know.

    Programs that were edited or moved since the run began are taken from its own copies.

    Raises:
        TrainingError: a table has changed, so that the run's numbers would not go on.
    """
    changed = [name for name, digest in config.files.items() if _digest(Path(name)) != digest]
    # A module is found from the folder where the run began only; its copy from anywhere.
    by_module = bool(config.files) and not is_table(config.task) and ".py" not in config.task
    if not changed and not by_module:
        return config.origin(), []
    if is_table(config.task):
        raise TrainingError(
            f"{changed[0]} has changed since this run began, or is gone: its numbers would not go on. Put the file "
            "back as it was, or start a new run."
        )
    copies = run / COPIES
    _check_copies(config.files, copies)
    if not changed:
        return config.origin(copies), []
    names = ", ".join(Path(name).name for name in changed)
    note = (
        f"{names} changed since this run began, or moved: it goes on with the copy in {copies}. "
        "To train what you have edited start a new run."
    )
    return config.origin(copies), [note]


def _check_copies(files: Mapping[str, str], copies: Path) -> None:
    kept = {_digest(path) for path in copies.rglob("*.py")}
    if not set(files.values()) <= kept:
        raise TrainingError(
            f"the programs in {copies} are not as this run wrote them, and the originals have changed: put back either."
        )


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
