"""What defines a run, and how a run is built from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from imstep.runs.optimizers import get_optimizer
from imstep.runs.peers import ALONE, Peers
from imstep.runs.rows import Limits, Schedule, TrainingError
from imstep.runs.runner import Trainer
from imstep.tasks import Origin, TableOptions, Task, find_task

__all__ = ["RunConfig", "set_threads", "torch_dtype"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}
MOST_THREADS = 1024
_LIMITS = ("epochs", "budget", "seconds")
_LATER: dict[str, Any] = {"table": None, "files": {}, "first_points": None}
"""Settings that runs of earlier versions do not have, and their values there."""
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "int | None": (int, type(None)),
    "str | None": (str, type(None)),
    "float | None": (int, float, type(None)),
    "dict[str, float]": (dict,),
    "dict[str, str]": (dict,),
    "dict[str, Any] | None": (dict, type(None)),
}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        TrainingError: training does not run in it.
    """
    if name not in DTYPES:
        raise TrainingError(f"dtype={name!r}: training runs in {' or '.join(DTYPES)}.")
    return DTYPES[name]


def set_threads(number: int) -> None:
    """Let torch compute in so many threads.

    Raises:
        TrainingError: there are none, or so many that starting them ends the process.
    """
    if not 1 <= number <= MOST_THREADS:
        raise TrainingError(f"threads={number}: give at least one, and at most {MOST_THREADS}.")
    torch.set_num_threads(number)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers.

    Args:
        task: name of a task, or a file that defines one (see `imstep.tasks.get_task`).
        optimizer: name of an optimizer.
        options: its options; what is left out takes its default.
        seed: initial weights, order of mini-batches, dropout.
        epochs, budget, seconds: limits; the first reached ends the run.
        batch_size: examples per step; None for the full batch.
        device: a torch device such as "cpu" or "cuda:0".
        dtype: "float32" or "float64".
        threads: CPU threads of torch; part of the run, because sums depend on it.
        data: folder of the data set, or None.
        examples: train on the first so many examples, or None for all.
        evaluate_every: epochs between evaluations.
        first_points: points of the first steps where points are drawn anew for each; None for as many in all.
        table: how a table becomes a task, as `TableOptions.to_dict` writes it; None for other tasks.
        files: SHA-256 of the files that a task of one's own is made from.

    Raises:
        TrainingError: an option is not finite.
    """

    task: str
    optimizer: str
    options: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    epochs: float | None = None
    budget: float | None = None
    seconds: float | None = None
    batch_size: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    data: str | None = None
    examples: int | None = None
    evaluate_every: float = 1.0
    first_points: int | None = None
    table: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.options.items():
            if not math.isfinite(value):
                raise TrainingError(f"{name}={value:g}: give a finite number, or leave it out for its default.")

    @property
    def limits(self) -> Limits:
        """When the run ends.

        Raises:
            TrainingError: no limit, or one that is not above zero.
        """
        return Limits(self.epochs, self.budget, self.seconds)

    @property
    def identity(self) -> str:
        """SHA-256 of what decides each step; limits and the data's folder may change on resuming."""
        settings = {k: v for k, v in asdict(self).items() if k not in (*_LIMITS, "data")}
        decisive = {k: v for k, v in settings.items() if k not in _LATER or v != _LATER[k]}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The config that `to_dict` wrote.

        Raises:
            TrainingError: a key is missing or unknown, or a value is of the wrong type.
        """
        values = {**_LATER, **values}
        known = {f.name: str(f.type) for f in fields(cls)}
        odd = sorted(set(values) ^ set(known))
        if odd:
            state = "missing" if odd[0] in known else "unknown"
            raise TrainingError(f"the configuration's {odd[0]!r} is {state}: it is another version's.")
        for name, kind in known.items():
            if not isinstance(values[name], _TYPES[kind]):
                raise TrainingError(f"the configuration's {name!r} is {values[name]!r}, expected {kind}.")
        return cls(**values)

    def origin(self, kept: Path | None = None) -> Origin:
        """The task and its files; `kept` holds copies of programs to be run in place of the originals.

        Raises:
            TaskError: it is not there, or cannot be used.
        """
        return find_task(self.task, None if self.table is None else TableOptions.from_dict(self.table), kept)

    def build(self, task: Task | None = None, peers: Peers = ALONE) -> Trainer:
        """Task, model and optimizer at their start. Sets torch's number of threads for this process.

        Args:
            task: where it has been looked up already.
            peers: the processes that train together.

        Raises:
            TaskError, OptimizerError, TrainingError: a setting that cannot be; the message says why.
        """
        spec = get_optimizer(self.optimizer)
        options, dtype, device = spec.resolve(self.options), torch_dtype(self.dtype), self._device()
        set_threads(self.threads)
        problem = (task or self.origin().task).build(
            self.seed, device=device, dtype=dtype, data=self.data, examples=self.examples
        )
        if self.first_points is not None:
            problem = problem.beginning_with(self.first_points)
        stepper = spec.create(problem, peers.group, **options)
        if self.first_points is not None and not stepper.grows:
            raise TrainingError(
                f"first_points={self.first_points}: how many points {self.optimizer} needs does not follow from its "
                "steps. Leave it out (--first-points), or choose least-squares."
            )
        return Trainer(
            problem,
            stepper,
            batch_size=self.batch_size,
            seed=self.seed,
            schedule=Schedule(self.evaluate_every),
            peers=peers,
        )

    def _device(self) -> torch.device:
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"device={self.device!r} cannot be used here: {reason}") from error
        return device
