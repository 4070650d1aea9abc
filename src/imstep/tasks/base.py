"""What a task is: data, a model and a loss, reproducible from one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

__all__ = ["Batch", "DataNotFoundError", "Evaluation", "Metric", "Problem", "Task", "TaskError"]

EVALUATION_CHUNK = 8192
"""Examples per forward pass of an evaluation; bounds its memory, does not change its mean."""


class TaskError(ValueError):
    """A task cannot be built as asked; the message says what to change."""


class DataNotFoundError(TaskError):
    """The files of a data set are not where they were looked for."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples: `inputs` of shape (k, ...) and `targets` of shape (k, ...).

    Raises:
        TaskError: the two lengths differ, or there is no example at all.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise TaskError(
                f"{len(self.inputs)} inputs but {len(self.targets)} targets: a batch needs one per input."
            )
        if len(self.inputs) == 0:
            raise TaskError("the batch is empty: its mean loss is 0/0. Give at least one example.")

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: torch.Tensor | slice) -> Batch:
        """The examples at `index` (a slice, or int64 positions on the batch's device)."""
        return Batch(self.inputs[index], self.targets[index])

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The same examples on `device`; floating-point tensors as `dtype`, class labels as they are."""
        return Batch(_cast(self.inputs, device, dtype), _cast(self.targets, device, dtype))


def _cast(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


@dataclass(frozen=True)
class Metric:
    """A figure people read besides the loss: the mean of `function(outputs, targets)`, shape (k,)."""

    name: str
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss (and metric, if the problem has one) over a set of examples."""

    loss: float
    metric: float | None
    examples: int


@dataclass(frozen=True, eq=False)
class Problem:
    """A task made concrete: tensors on a device, and a model with its initial weights.

    Args:
        task: name of the task.
        model: maps inputs (k, ...) to outputs (k, ...); the only mutable part.
        train: the examples to train on.
        heldout: examples that are never trained on.
        loss: `loss(outputs, targets)` -> scalar, a *mean* over examples (chunks are averaged).
        metric: what else to report, or None.
        image_shape: (height, width) when an input is one picture, for drawing it; else None.
    """

    task: str
    model: nn.Module
    train: Batch
    heldout: Batch
    loss: nn.Module
    metric: Metric | None = None
    image_shape: tuple[int, int] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def size(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters)

    def closure(self, batch: Batch) -> Callable[[], torch.Tensor]:
        """A function without arguments that returns the loss on `batch` (0-dim, with its graph)."""
        return lambda: self.loss(self.model(batch.inputs), batch.targets)

    def batch_count(self, batch_size: int | None) -> int:
        """Number of batches in an epoch; `batch_size=None` is the full batch."""
        if batch_size is None:
            return 1
        if batch_size < 1:
            raise TaskError(f"batch_size={batch_size}: a batch holds at least one; leave it out for all.")
        return -(-len(self.train) // batch_size)

    def batches(self, epoch: int, batch_size: int | None = None, seed: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, a function of (seed, epoch) alone: a resumed run sees the same ones.

        Every example comes once. Sizes differ by at most one and never exceed `batch_size`, so the last batch
        is no noisier than the others. The full batch is not permuted.

        Raises:
            TaskError: `batch_size` is below 1.
        """
        count = self.batch_count(batch_size)
        if count == 1:
            yield self.train
            return
        generator = torch.Generator().manual_seed(_mix(seed, epoch))
        order = torch.randperm(len(self.train), generator=generator).to(self.train.inputs.device)
        for index in torch.tensor_split(order, count):
            yield self.train.take(index)

    def evaluate(self, batch: Batch) -> Evaluation:
        """Mean loss and metric over `batch`, in evaluation mode, no graph; the model's mode is put back."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                return self._evaluate(batch)
        finally:
            for module, training in modes:
                module.training = training

    def _evaluate(self, batch: Batch) -> Evaluation:
        loss = metric = 0.0
        for start in range(0, len(batch), EVALUATION_CHUNK):
            chunk = batch.take(slice(start, start + EVALUATION_CHUNK))
            outputs = self.model(chunk.inputs)
            share = len(chunk) / len(batch)
            loss += share * float(self.loss(outputs, chunk.targets))
            if self.metric is not None:
                metric += share * float(self.metric.function(outputs, chunk.targets).double().mean())
        return Evaluation(loss, metric if self.metric is not None else None, len(batch))


def _mix(seed: int, epoch: int) -> int:
    """One 63-bit seed from two numbers (splitmix64): (0, 1) and (1, 0) give unrelated permutations."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


@dataclass(frozen=True)
class Task:
    """A named recipe for a `Problem`.

    Args:
        name: what the command line calls it, for example "digits-mlp".
        title: a few words for a table.
        description: one sentence: data, model, loss.
        load: `load(data)` -> (train, heldout), CPU, float32; `data` is a folder to look in, or None.
        model: makes the model, drawing initial weights from the global generator.
        loss: the mean loss.
        metric: what else to report, or None.
        image_shape: (height, width) of an input, for drawing.
    """

    name: str
    title: str
    description: str
    load: Callable[[Path | None], tuple[Batch, Batch]]
    model: Callable[[], nn.Module]
    loss: nn.Module
    metric: Metric | None = None
    image_shape: tuple[int, int] | None = None

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
            seed: decides the initial weights; the data and their split are the same for every seed.
            device: where the tensors live.
            dtype: float32 or float64.
            data: a folder to look for the data in first.
            examples: train on the first so many examples only (>= 1); None for all.

        Raises:
            DataNotFoundError: the data set is not installed; says how to get it.
            TaskError: `dtype` is not floating point, or `examples` is below 1.
        """
        if not dtype.is_floating_point:
            raise TaskError(f"dtype={dtype}: the model needs a floating-point type such as torch.float64.")
        if examples is not None and examples < 1:
            raise TaskError(f"examples={examples}: train on at least one example, or leave it out for all.")
        target = torch.device(device)
        train, heldout = self.load(None if data is None else Path(data))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model().to(target, dtype)
        return Problem(
            task=self.name,
            model=model,
            train=train.take(slice(0, examples)).to(target, dtype),
            heldout=heldout.to(target, dtype),
            loss=self.loss,
            metric=self.metric,
            image_shape=self.image_shape,
        )
