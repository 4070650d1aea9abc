"""Checkpoints: safetensors and JSON in one folder, with a manifest that proves it whole.

A checkpoint holds, for each part (model, optimizer, trainer), `<part>.json` (structure and numbers) and
`<part>.safetensors` (tensors). `manifest.json`, written last, holds the size and SHA-256 of each file.
Nothing is pickled, so opening a stranger's checkpoint runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from imstep.runs.codec import flatten, unflatten
from imstep.runs.files import write_atomically, write_json

__all__ = ["CheckpointError", "read_checkpoint", "write_checkpoint"]

FORMAT = "imstep-checkpoint"
VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not one of this run; the message says which."""


def write_checkpoint(folder: Path, parts: Mapping[str, Any], *, run: str) -> None:
    """Replace the checkpoint in `folder` by `parts`.

    The new one is written beside it and swapped in by renames; a crash at any moment leaves a whole one.

    Args:
        folder: where the checkpoint is; its parent exists.
        parts: name -> nested state of tensors, numbers, strings, lists, tuples, dicts and None.
        run: identifies the run, compared on reading.

    Raises:
        CodecError: a state holds something else.
        OSError: the disk refuses.
    """
    fresh, old = _beside(folder, "new"), _beside(folder, "old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    files: dict[str, dict[str, Any]] = {}
    for name, state in parts.items():
        structure, tensors = flatten(state)
        content = {
            f"{name}.json": json.dumps(structure, allow_nan=False).encode(),
            f"{name}.safetensors": safetensors.torch.save(tensors),
        }
        for file, raw in content.items():
            write_atomically(fresh / file, raw)
            files[file] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    write_json(fresh / "manifest.json", {"format": FORMAT, "version": VERSION, "run": run, "files": files})
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(folder: Path, *, run: str) -> dict[str, Any]:
    """The parts that `write_checkpoint` wrote, tensors on the CPU.

    Raises:
        CheckpointError: there is none, a file is missing, truncated or changed, or it is of another run.
    """
    folder = _present(folder)
    manifest = _manifest(folder)
    if manifest["run"] != run:
        raise CheckpointError(
            f"{folder} is another run's checkpoint: task, optimizer or settings differ from this run's "
            "config.json. Put back the checkpoint that belongs here."
        )
    raw = {file: _content(folder / file, entry) for file, entry in manifest["files"].items()}
    names = [file.removesuffix(".json") for file in raw if file.endswith(".json")]
    try:
        return {name: _part(raw[f"{name}.json"], raw[f"{name}.safetensors"]) for name in names}
    except (KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}): it is not imstep's.") from error


def _part(structure: bytes, tensors: bytes) -> Any:
    return unflatten(json.loads(structure), safetensors.torch.load(tensors))


def _beside(folder: Path, word: str) -> Path:
    return folder.with_name(f".{folder.name}.{word}")


def _present(folder: Path) -> Path:
    """The checkpoint, or the former one if the process died between the two renames."""
    old = _beside(folder, "old")
    if not folder.exists() and old.exists():
        return old
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: this run has no checkpoint to resume from.")
    return folder


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no manifest.json: it is not an imstep checkpoint.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): truncated or foreign.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of an imstep checkpoint.")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint version {manifest.get('version')}; this imstep reads {VERSION}. "
            "Resume with the imstep that wrote it."
        )
    return manifest


def _content(path: Path, entry: Mapping[str, Any]) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(raw) != entry["bytes"]:
        raise CheckpointError(
            f"{path} is truncated or overwritten: {len(raw)} bytes, its manifest says {entry['bytes']}. "
            "Restore it from a copy, or start the run again with another --out."
        )
    if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path} was changed after writing (SHA-256 differs). Restore it from a copy.")
    return raw
