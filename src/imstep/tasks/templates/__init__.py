"""Programs to start one's own problem from; `imstep new` copies one of them."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from imstep.tasks.base import TaskError

__all__ = ["KINDS", "write_program"]

KINDS = ("classification", "regression", "autoencoder", "pinn")


def write_program(name: str, kind: str) -> Path:
    """Write a program that defines a task of that kind, ready to run and to be changed.

    Args:
        name: the file, with or without `.py`.
        kind: one of `KINDS`.

    Returns:
        The file.

    Raises:
        TaskError: there is no such kind, or the file is there already: it is never overwritten; a module has its name.
    """
    if kind not in KINDS:
        raise TaskError(f"--kind {kind}: give one of {', '.join(KINDS)}.")
    file = Path(name if name.endswith(".py") else f"{name}.py")
    if file.stem in ("", ".py") or file.stem in sys.modules or file.stem in sys.stdlib_module_names:
        raise TaskError(f"{file.name} would hide the module of that name, or has none: choose another name.")
    text = resources.files(__name__).joinpath(f"{kind}.py").read_text(encoding="utf-8")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text.replace("FILE", file.name).replace("NAME", file.stem))
    except FileExistsError as error:
        raise TaskError(f"{file} exists already and is left as it is. Choose another name, or move it away.") from error
    except OSError as error:
        raise TaskError(f"{file} cannot be written: {error.strerror}.") from error
    return file
