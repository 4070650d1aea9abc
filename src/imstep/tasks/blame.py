"""What goes wrong in the parts of a task, its data, network and loss, is told with their own line."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imstep.tasks.base import TaskError

__all__ = ["in_parts_of"]

_OTHERS = (str(Path(__file__).parents[1]), "<", *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
"""How the files begin that no task of one's own is in."""


@contextmanager
def in_parts_of(task: str) -> Iterator[None]:
    """Within it only the parts of a task are called, so that an error is theirs.

    Args:
        task: its name.

    Raises:
        TaskError: anything was raised; with the last line of one's own that led there, as far as one did.
    """
    try:
        yield
    except (TaskError, OSError):
        raise
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OTHERS)]
        place = f"{own[-1].filename}, line {own[-1].lineno}" if own else f"network, loss or data of {task!r}"
        raise TaskError(f"{place}: {type(error).__name__}: {error}") from error
