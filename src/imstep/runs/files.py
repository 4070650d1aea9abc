"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["obstacle", "write_atomically", "write_json"]


def obstacle(path: Path) -> Path | None:
    """What keeps `path` from being a folder that one can write to: the file or folder where nothing can be made."""
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    return None if above.is_dir() and os.access(above, os.W_OK) else above


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to disk, then rename: a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
