"""What a task is: a model and a loss on batches, reproducible from one seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from imstep.optim import GrowingPoints, MicroBatches

__all__ = [
    "AnyBatch", "DataNotFoundError", "Evaluation", "Metric", "Problem", "Surface", "Task", "TaskError", "mix", "span",
]  # fmt: skip


class TaskError(ValueError):
    """A task cannot be built as asked; the message says what to change."""


class DataNotFoundError(TaskError):
    """The files of a data set are not where they were looked for."""


class AnyBatch(Protocol):
    """What a loss is taken over: examples, or points of a domain."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Metric:
    """A figure people read besides the loss: `of_mean` of the mean of `function(outputs, targets)`, shape (k,)."""

    name: str
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    of_mean: Callable[[float], float] = float


@dataclass(frozen=True)
class Evaluation:
    """Mean loss (and metric, if the problem has one) over a set of examples, or the error of a solution."""

    loss: float
    metric: float | None
    examples: int


@dataclass(frozen=True)
class Surface:
    """A function of two variables on a grid, to be drawn.

    Args:
        values: rows of numbers; a row runs along the first axis.
        extent: (least, largest) of the first axis and of the second.
        axes: their names.
        colors: of the values, as matplotlib calls them; "gray" for a photograph.
    """

    values: list[list[float]]
    extent: tuple[tuple[float, float], tuple[float, float]]
    axes: tuple[str, str]
    colors: str = "RdBu_r"


class Problem(ABC):
    """A task made concrete: tensors on a device, and a model with its initial weights.

    Attributes:
        task: name of the task.
        model: the only mutable part.
        metric: what is reported besides the loss, or None.
        train: the batch that the training loss is reported on.
        heldout: what is never trained on, and the held-out loss is reported on.
    """

    task: str
    model: nn.Module
    metric: Metric | None
    train: Any
    heldout: Any

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def size(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def states(self) -> tuple[nn.Module, ...]:
        """Modules whose outputs are hidden states of a recurrent network, for structural damping; () for others."""
        return ()

    @property
    @abstractmethod
    def redrawn(self) -> bool:
        """Whether every step has data of its own, also with the full batch."""

    @property
    @abstractmethod
    def data(self) -> str:
        """How much data there is, in words."""

    @abstractmethod
    def closure(self, batch: Any) -> Callable[[], torch.Tensor]:
        """A function without arguments that returns the loss on `batch` (0-dim, with its graph)."""

    def share(self, batch: Any, rank: int, size: int) -> MicroBatches:
        """What the process ``rank`` of ``size`` evaluates of a batch, which all have whole; together the loss on it.

        Raises:
            TaskError: this problem's batches cannot be shared out.
        """
        raise TaskError(
            f"{self.task} says nothing of how a batch is shared out over processes. Give its {type(self).__name__} a "
            "method share(batch, rank, size), or train in one process."
        )

    @abstractmethod
    def batch_count(self, batch_size: int | None) -> int:
        """Number of batches in an epoch; `batch_size=None` is the full batch."""

    @abstractmethod
    def batches(self, epoch: int, batch_size: int | None = None, seed: int = 0) -> Iterator[Any]:
        """The batches of one epoch, a function of (seed, epoch) alone, or of the model as well: a resumed run sees the
        same ones.
        """

    def beginning_with(self, points: int) -> Problem:
        """The same problem with so many points in the first steps, and more as they are needed.

        Raises:
            TaskError: its steps have no points of their own, or not as many.
        """
        raise TaskError(
            f"{self.task} has data, not points that are drawn anew for each step, so it cannot begin with fewer. Leave "
            "out --first-points; for mini-batches of examples there is --batch-size."
        )

    @property
    def balanced(self) -> bool:
        """Whether terms of the loss are to be weighed anew in every step, by an optimizer that can."""
        return False

    def growing(self) -> GrowingPoints | None:
        """What says how many points a step has, where that changes in a run; a new one. None for always as many."""
        return None

    def drawn(self, epoch: int, seed: int, count: int) -> Any:
        """The batch of an epoch with so many points in all, as :meth:`batches`; where :meth:`growing` is one."""
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, batch: Any) -> Evaluation:
        """Mean loss and metric over `batch`, in evaluation mode, no graph; the model's mode is put back."""

    @property
    def elsewhere(self) -> Any | None:
        """Points of which no step sees any, to check steps at, where all steps have the same ones; else None."""
        return None

    def pictures(self, count: int) -> tuple[Any, Any]:
        """The first held-out targets and the model's outputs, where those are pictures: (k, height, width), 0 to 255.

        Nested lists; empty for other problems.
        """
        return (), ()

    def surfaces(self) -> tuple[Surface, Surface] | None:
        """The solution and what the model makes of it, where both are functions of two variables that can be drawn."""
        return None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the model is in evaluation mode and gradients are off; both are put back afterwards."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training


@dataclass(frozen=True)
class Task(ABC):
    """A named recipe for a `Problem`.

    Args:
        name: what the command line calls it, for example "digits-mlp".
        title: a few words for a table.
        description: one sentence: data, model, loss.
    """

    name: str
    title: str
    description: str

    @property
    @abstractmethod
    def has_batches(self) -> bool:
        """Whether its data can be split into mini-batches."""

    @property
    def squares(self) -> bool | None:
        """Whether its loss is a sum of squares, so that methods for least squares apply; None if a step must tell."""
        return None

    @property
    def budget(self) -> float | None:
        """Gradient-equivalents that a run is given where none are asked for; None for the command's own."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that a reader of results should know, such as how missing values were filled."""
        return ()

    def build(
        self,
        seed: int = 0,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        data: Path | str | None = None,
        examples: int | None = None,
    ) -> Problem:
        """Data and a freshly initialised model.

        Weights are drawn on the CPU in float32 whatever `device` and `dtype` are, so that runs on other
        devices and in float64 start at the same point. The caller's random state is left as it was.

        Args:
            seed: decides the initial weights, and for a table of one's own which rows are held out; the data of
                other tasks and their split are the same for every seed.
            device: where the tensors live.
            dtype: float32 or float64.
            data: a folder to look for the data in first.
            examples: train on the first so many examples only (>= 1); None for all.

        Raises:
            DataNotFoundError: the data set is not installed; says how to get it.
            TaskError: `dtype` is not floating point, `examples` is below 1, or `seed` is too large.
        """
        check_seed(seed)
        if not dtype.is_floating_point:
            raise TaskError(f"dtype={dtype}: the model needs a floating-point type such as torch.float64.")
        if examples is not None and examples < 1:
            raise TaskError(f"examples={examples}: train on at least one example, or leave it out for all.")
        target = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._model().to(target, dtype)
        return self._problem(model, seed, target, dtype, None if data is None else Path(data), examples)

    @abstractmethod
    def _model(self) -> nn.Module:
        """The model, its weights drawn from the global generator."""

    @abstractmethod
    def _problem(
        self,
        model: nn.Module,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        data: Path | None,
        examples: int | None,
    ) -> Problem:
        """The problem of training ``model``."""


def check_seed(seed: int) -> None:
    """Refuse what no generator takes.

    Raises:
        TaskError: it has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise TaskError(f"seed={seed}: give a whole number below 2**63.")


def span(count: int, rank: int, size: int) -> slice:
    """Where the part of the process ``rank`` is among ``count``; parts follow each other, and differ by at most one.

    >>> [span(7, rank, 3) for rank in range(3)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    """
    return slice(count * rank // size, count * (rank + 1) // size)


def mix(seed: int, epoch: int) -> int:
    """One 63-bit seed from two numbers (splitmix64): (0, 1) and (1, 0) give unrelated permutations."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
