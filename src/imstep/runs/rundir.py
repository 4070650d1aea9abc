"""A run's folder: config.json, steps.jsonl (one line per step and evaluation), checkpoint/, report.json."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from imstep.runs.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from imstep.runs.config import RunConfig
from imstep.runs.environment import environment
from imstep.runs.files import obstacle, write_atomically, write_json
from imstep.runs.rows import LogRow, TrainingError, present_status
from imstep.runs.runner import Trainer
from imstep.runs.sources import Snapshot, keep, snapshot
from imstep.tasks import Origin

__all__ = ["RunDirectory", "RunDirectoryError"]

FORMAT = "imstep-run"
VERSION = 1


class RunDirectoryError(RuntimeError):
    """A run directory exists already, or is not one; the message says what to do."""


class RunDirectory:
    """The files of one run. Make it with `create`, `planned` or `open`; close it, or use it as a context.

    Where several processes train together, one writes, and the others have the same object with ``writes=False``, of
    which every method that would write does nothing.
    """

    def __init__(self, path: Path, config: RunConfig, made_in: Mapping[str, str], writes: bool = True) -> None:
        self.path = path
        self.config = config
        self.writes = writes
        self._made_in = dict(made_in)
        self._log: IO[str] | None = None
        self._rows = 0
        self._origin: Origin | None = None
        self._sources: Snapshot = {}
        self._begun = True
        self.saved_step: int | None = None

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunDirectory:
        """Begin a run in a new (or empty) folder.

        Raises:
            RunDirectoryError: the folder holds something, or cannot be made.
        """
        run = cls.planned(path, config)
        run.begin()
        return run

    @classmethod
    def planned(cls, path: Path, config: RunConfig, origin: Origin | None = None) -> RunDirectory:
        """A run whose folder can be made, and is not yet: what is refused at its first step leaves nothing behind.

        Args:
            origin: the task's files, to be kept with the run.

        Raises:
            RunDirectoryError: the folder holds something, or cannot be made.
        """
        try:
            occupied = path.exists() and any(path.iterdir())
            above = obstacle(path)
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be used as a run directory: {error.strerror}.") from error
        if occupied:
            is_run = (path / "config.json").exists()
            resume = f", or continue that run with: imstep train --resume {shlex.quote(str(path))}" if is_run else ""
            raise RunDirectoryError(f"{path} exists and is not empty. Choose another --out{resume}.")
        if above is not None:
            raise RunDirectoryError(f"{path} cannot be used as a run directory: nothing can be made in {above}.")
        run = cls(path, config, environment())
        run._origin, run._begun = origin, False
        # As it is now, not as it may be edited while the first step is taken.
        run._sources = {} if origin is None else snapshot(origin)
        return run

    def begin(self) -> None:
        """Make the folder of a planned run with its config and copies of the task's programs; else do nothing.

        Raises:
            RunDirectoryError: the folder cannot be made.
        """
        if self._begun or not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            origin = self._origin
            # What a program imports later on, in its functions, comes in addition.
            files = {} if origin is None else keep({**snapshot(origin), **self._sources}, origin.root, self.path)
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be used as a run directory: {error.strerror}.") from error
        self.config = replace(self.config, files=files)
        self._begun = True
        self._write_config()
        self._open_log()

    @classmethod
    def open(cls, path: Path, writes: bool = True) -> RunDirectory:
        """An existing run.

        Raises:
            RunDirectoryError: it is not there, or was not written by imstep.
        """
        file = path / "config.json"
        try:
            content = json.loads(file.read_bytes())
        except FileNotFoundError as error:
            raise RunDirectoryError(
                f"{path} holds no run (no config.json). Start one with --out {path}."
            ) from error
        except (OSError, ValueError) as error:
            raise RunDirectoryError(
                f"{file} cannot be read ({error}): it is truncated or foreign."
            ) from error
        if (
            not isinstance(content, dict)
            or content.get("format") != FORMAT
            or content.get("version") != VERSION
        ):
            raise RunDirectoryError(f"{file} is not the configuration of an imstep run (version {VERSION}).")
        try:
            config = RunConfig.from_dict(content["config"])
        except (KeyError, TypeError, TrainingError) as error:
            raise RunDirectoryError(f"{file} cannot be used: {error}") from error
        return cls(path, config, content.get("environment", {}), writes)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the log; nothing else is open."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def differences(self) -> list[str]:
        """In what this machine differs from the one the run was begun on; then bits may differ, too."""
        here = environment()
        decisive = ("imstep", "PyTorch", "system", "processor", "threads")
        pairs = [(name, self._made_in.get(name), here[name]) for name in decisive]
        return [f"{name} was {then}, is {now}" for name, then, now in pairs if then != now]

    def extend(self, **limits: float | None) -> None:
        """Replace the limits that are given, for a run that goes on longer than first asked.

        Raises:
            TrainingError: one is not above zero; the run keeps its own.
        """
        given = {name: value for name, value in limits.items() if value is not None}
        if given:
            merged = {"epochs": None, "budget": None, "seconds": None, **given}
            longer = RunConfig.from_dict({**self.config.to_dict(), **merged})
            _ = longer.limits
            self.config = longer
            self._write_config()

    def append(self, row: LogRow) -> None:
        """Add one line to steps.jsonl; numbers that JSON has no word for (nan, inf) become null."""
        if not self.writes:
            return
        log = self._log or self._open_log()
        log.write(json.dumps(_plain(row.to_dict()), allow_nan=False) + "\n")
        self._rows += 1

    def save(self, trainer: Trainer) -> None:
        """Flush the log, then replace the checkpoint; the log is never behind the checkpoint.

        Raises:
            CodecError: the optimizer's state holds something that is not a tensor, number or string.
        """
        if not self.writes:
            return
        log = self._log or self._open_log()
        log.flush()
        os.fsync(log.fileno())
        parts = {
            "model": trainer.problem.model.state_dict(),
            "optimizer": trainer.stepper.optimizer.state_dict(),
            "trainer": {**trainer.state_dict(), "rows": self._rows},
        }
        write_checkpoint(self.path / "checkpoint", parts, run=self.config.identity)
        self.saved_step = trainer.totals.steps

    def restore(self, trainer: Trainer) -> None:
        """Load the checkpoint into a freshly built trainer; log lines after it are dropped.

        Raises:
            CheckpointError: it is missing, damaged, or of another run or model.
        """
        parts = read_checkpoint(self.path / "checkpoint", run=self.config.identity)
        try:
            trainer.problem.model.load_state_dict(parts["model"])
            trainer.stepper.optimizer.load_state_dict(parts["optimizer"])
            rows = parts["trainer"].pop("rows")
            trainer.load_state_dict(parts["trainer"])
            self.saved_step = trainer.totals.steps
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{self.path / 'checkpoint'} does not fit this run: {reason}") from error
        self._cut_log(rows)

    def write_report(self, trainer: Trainer) -> None:
        """report.json: how the run ended, what it used, its last evaluation."""
        if not self.writes:
            return
        evaluations = [row for row in self.rows() if row["kind"] == "evaluation"]
        report = {
            "ending": trainer.ending.name.lower() if trainer.ending else "interrupted",
            "parameters": trainer.problem.size,
            "processes": trainer.peers.size,
            "totals": asdict(trainer.totals),
            "evaluation": evaluations[-1] if evaluations else None,
            "environment": environment(),
        }
        write_json(self.path / "report.json", _plain(report))

    def rows(self) -> list[dict[str, Any]]:
        """All lines of steps.jsonl, oldest first.

        Raises:
            RunDirectoryError: a line is not JSON.
        """
        if self._log is not None:
            self._log.flush()
        lines = (self.path / "steps.jsonl").read_text().splitlines()
        try:
            return [_present(json.loads(line)) for line in lines]
        except ValueError as error:
            raise RunDirectoryError(f"{self.path / 'steps.jsonl'} has a damaged line ({error}).") from error

    def _write_config(self) -> None:
        if not self.writes:
            return
        content = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_dict(),
            "environment": self._made_in,
        }
        write_json(self.path / "config.json", content)

    def _open_log(self) -> IO[str]:
        self._log = (self.path / "steps.jsonl").open("a", encoding="utf-8", buffering=1)
        return self._log

    def _cut_log(self, rows: int) -> None:
        """Keep the first `rows` lines: later ones are of steps after the checkpoint, and are made again."""
        if not self.writes:
            return
        self.close()
        file = self.path / "steps.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        if len(lines) < rows:
            raise CheckpointError(
                f"{file} has {len(lines)} lines, the checkpoint was written after {rows}: lines were lost. "
                "Restore the file from a copy."
            )
        for number, line in enumerate(lines[:rows], 1):
            if not (line.endswith(b"\n") and _is_json(line)):  # what is written next would be joined to it
                raise CheckpointError(f"{file}, line {number}, is damaged. Restore the file from a copy.")
        write_atomically(file, b"".join(lines[:rows]))
        self._rows = rows


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _present(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the status names of this version."""
    for holder in (row, row.get("record")):
        if holder and "status" in holder:
            holder["status"] = present_status(holder["status"])
    return row


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
