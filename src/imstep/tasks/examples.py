"""Tasks on examples: inputs, targets and a mean loss over both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imstep.curvature import MeanOverSamples
from imstep.optim import MicroBatches
from imstep.tasks.base import Evaluation, Metric, Problem, Surface, Task, TaskError, mix, span
from imstep.tasks.blame import in_parts_of

__all__ = ["ACCURACY", "Batch", "ExampleProblem", "ExampleTask", "held_out"]

Loss = Callable[[Tensor, Tensor], Tensor]
Surfaces = tuple[Surface, Surface]

EVALUATION_CHUNK = 8192
"""Examples per forward pass of an evaluation; bounds its memory, does not change its mean."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples: `inputs` of shape (k, ...) and `targets` of shape (k, ...).

    Raises:
        TaskError: one is no tensor, the two lengths differ, or there is no example at all.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor) or not isinstance(self.targets, Tensor):
            kinds = type(self.inputs).__name__, type(self.targets).__name__
            raise TaskError(f"a batch is of two tensors, got {' and '.join(kinds)}: torch.as_tensor makes one.")
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


Loader = Callable[[Path | None], tuple[Batch, Batch]]
"""Batches to train on and to hold out, from a folder of data."""


def held_out(inputs: Tensor, targets: Tensor, share: float = 0.2, *, seed: int = 0) -> tuple[Batch, Batch]:
    """(train, heldout): examples split at random, the same way for the same seed.

    Args:
        inputs: (k, ...).
        targets: (k, ...).
        share: of the examples to hold out, in (0, 1); at least one, and at least one stays.
        seed: decides which.

    Raises:
        TaskError: `share` is out of range, the lengths differ, or there are less than two examples.

    Example:
        >>> train, heldout = held_out(torch.arange(10.0)[:, None], torch.arange(10.0)[:, None])
        >>> len(train), len(heldout)
        (8, 2)
    """
    if not 0 < share < 1:
        raise TaskError(f"share={share}: hold out more than none and less than all of the examples.")
    examples = Batch(inputs, targets)
    if len(examples) < 2:
        raise TaskError("one example cannot be split: give at least two.")
    aside = min(max(1, round(share * len(examples))), len(examples) - 1)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(mix(seed, 0)))
    return examples.take(order[aside:]), examples.take(order[:aside])


def _told(found: Any) -> str:
    """What a function gave instead."""
    if isinstance(found, (list, tuple)):
        return f"{len(found)} of {', '.join(type(part).__name__ for part in found[:3])}"
    return f"an object of type {type(found).__name__}"


def _cast(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """(k, classes), (k,) -> (k,): 1 where the largest logit is the target's, else 0."""
    return outputs.argmax(dim=1) == targets


ACCURACY = Metric("accuracy", _accuracy)

_NO_SQUARES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.L1Loss, nn.SmoothL1Loss)


@dataclass(frozen=True, eq=False)
class ExampleProblem(Problem):
    """A model of examples.

    Args:
        task: name of the task.
        model: maps inputs (k, ...) to outputs (k, ...); the only mutable part.
        train: the examples to train on.
        heldout: examples that are never trained on.
        loss: `loss(outputs, targets)` -> scalar, a *mean* over examples (chunks are averaged).
        metric: what else to report, or None.
        image_shape: (height, width) when an input is one picture, for drawing it; else None.
        unit: what the examples are called.
        redraw: `redraw(seed)` -> the examples of an epoch, where every epoch has examples of its own; else None.
        draw: `draw(model)` -> a function that is to be found and what the model makes of it, to be drawn; or None.
        hidden: `hidden(model)` -> modules whose outputs are hidden states of a recurrent network; or None.
        chunk: examples that an evaluation takes at once; None for 8,192.
        whole: whether the loss is one of all examples together.
    """

    task: str
    model: nn.Module
    train: Batch
    heldout: Batch
    loss: Loss
    metric: Metric | None = None
    image_shape: tuple[int, int] | None = None
    unit: str = "examples"
    redraw: Callable[[int], Batch] | None = None
    draw: Callable[[nn.Module], Surfaces] | None = None
    hidden: Callable[[Any], tuple[nn.Module, ...]] | None = None
    chunk: int | None = None
    whole: bool = False

    @property
    def redrawn(self) -> bool:
        return self.redraw is not None

    @property
    def states(self) -> tuple[nn.Module, ...]:
        return () if self.hidden is None else self.hidden(self.model)

    @property
    def data(self) -> str:
        drawn = " redrawn each epoch" if self.redrawn else ""
        return f"{len(self.train):,} {self.unit}{drawn} ({len(self.heldout):,} held out)"

    def closure(self, batch: Batch) -> Callable[[], torch.Tensor]:
        """A function without arguments that returns the loss on `batch` (0-dim, with its graph)."""
        return lambda: self.loss(self.model(batch.inputs), batch.targets)

    def share(self, batch: Batch, rank: int, size: int) -> MicroBatches:
        own = span(len(batch), rank, size)
        parts = [batch.take(own)] if own.start < own.stop else []
        return MicroBatches(lambda part: self.closure(part)(), parts, reduction=MeanOverSamples(len))

    def batch_count(self, batch_size: int | None) -> int:
        """Number of batches in an epoch; `batch_size=None` is the full batch."""
        if batch_size is None:
            return 1
        if self.whole:
            raise TaskError(
                f"batch_size={batch_size}: the loss of {self.task} is one of all its examples together, no mean "
                "over them. Leave it out."
            )
        if batch_size < 1:
            raise TaskError(f"batch_size={batch_size}: a batch holds at least one; leave it out for all.")
        return -(-len(self.train) // batch_size)

    def batches(self, epoch: int, batch_size: int | None = None, seed: int = 0) -> Iterator[Batch]:
        """As for every problem.

        Every example comes once. Sizes differ by at most one and never exceed `batch_size`, so the last batch
        is no noisier than the others. The full batch is not permuted.

        Raises:
            TaskError: `batch_size` is below 1.
        """
        count = self.batch_count(batch_size)
        examples = self.train if self.redraw is None else self.redraw(mix(seed, epoch))
        if count == 1:
            yield examples
            return
        generator = torch.Generator().manual_seed(mix(seed, epoch))
        order = torch.randperm(len(examples), generator=generator).to(examples.inputs.device)
        for index in torch.tensor_split(order, count):
            yield examples.take(index)

    def evaluate(self, batch: Batch) -> Evaluation:
        loss = metric = 0.0
        with self.evaluating(), in_parts_of(self.task):
            size = self.chunk or EVALUATION_CHUNK
            for start in range(0, len(batch), size):
                chunk = batch.take(slice(start, start + size))
                outputs = self.model(chunk.inputs)
                share = len(chunk) / len(batch)
                loss += share * self._of(outputs, chunk.targets)
                if self.metric is not None:
                    metric += share * float(self.metric.function(outputs, chunk.targets).double().mean())
        return Evaluation(loss, None if self.metric is None else self.metric.of_mean(metric), len(batch))

    def _of(self, outputs: Tensor, targets: Tensor) -> float:
        """The loss as a number; or refuse."""
        found: Any = self.loss(outputs, targets)
        if isinstance(found, Tensor) and found.numel() != 1:
            raise TaskError(
                f"the loss of {self.task!r} has the shape {tuple(found.shape)}: it is one number, a mean over "
                "examples. Return .mean()."
            )
        return float(found)

    def pictures(self, count: int) -> tuple[Any, Any]:
        shape, targets = self.image_shape, self.heldout.targets[:count]
        if shape is None or not targets.is_floating_point() or targets[0].numel() != shape[0] * shape[1]:
            return (), ()
        with self.evaluating():
            outputs = self.model(self.heldout.inputs[:count])
        scaled = ((t.float().cpu() * 255).round().clamp(0, 255).nan_to_num(0.0) for t in (targets, outputs))
        shown, made = (tuple(t.reshape(-1, *shape).to(torch.int64).tolist()) for t in scaled)
        return shown, made

    def surfaces(self) -> Surfaces | None:
        if self.draw is None:
            return None
        with self.evaluating():
            return self.draw(self.model)


@dataclass(frozen=True)
class ExampleTask(Task):
    """A named recipe for an `ExampleProblem`.

    Args:
        name, title, description: as for every task.
        load: `load(data)` -> (train, heldout) on the CPU; `data` is a folder to look in (--data), or None.
        model: makes the model, drawing initial weights from the global generator.
        loss: `loss(outputs, targets)` -> scalar, a *mean* over examples.
        metric: what else to report, or None.
        image_shape: (height, width) of an input, for drawing.
        unit: what the examples are called.
        whole: whether the loss is one of all examples together, so that there are no mini-batches.
        redraw: `redraw(count, seed)` -> examples of an epoch on the CPU, where every epoch has its own: as many as
            `load` gives to train on, which are those that the training loss is reported on; else None.
        draw: `draw(model)` -> a function of two variables and what the model makes of it, to be drawn; or None.
        hidden: `hidden(model)` -> modules whose outputs are hidden states of a recurrent network, for structural
            damping; or None.
        chunk: examples that an evaluation takes at once, where 8,192 take too much memory.
        budget: gradient-equivalents that a run is given where none are asked for; None for the command's own.
        start: `start(model, train)` sets initial weights that follow from the examples to train on, which are as `load`
            gives them; None for none.
    """

    load: Loader
    model: Callable[[], nn.Module]
    loss: Loss
    metric: Metric | None = None
    image_shape: tuple[int, int] | None = None
    unit: str = "examples"
    whole: bool = False
    redraw: Callable[[int, int], Batch] | None = None
    draw: Callable[[nn.Module], Surfaces] | None = None
    hidden: Callable[[Any], tuple[nn.Module, ...]] | None = None
    chunk: int | None = None
    budget: float | None = None
    start: Callable[[Any, Batch], None] | None = None

    @property
    def has_batches(self) -> bool:
        return not self.whole

    @property
    def squares(self) -> bool | None:
        if isinstance(self.loss, nn.MSELoss):
            return True
        return False if self.whole or isinstance(self.loss, _NO_SQUARES) else None

    def _model(self) -> nn.Module:
        if isinstance(self.model, nn.Module):
            raise TaskError(
                f"the model of {self.name!r} is a network: give a function that makes one, such as lambda: "
                "nn.Linear(1, 1), so that each run begins with weights of its seed."
            )
        with in_parts_of(self.name):
            return self.model()

    def _loaded(self, data: Path | None) -> tuple[Batch, Batch]:
        """What `load` gives; or refuse."""
        if not callable(self.load):
            raise TaskError(f"load of {self.name!r} is a function of a folder, or None, that gives the examples.")
        with in_parts_of(self.name):
            found: Any = self.load(data)
        if not isinstance(found, (list, tuple)) or len(found) != 2 or not all(isinstance(b, Batch) for b in found):
            raise TaskError(
                f"load of {self.name!r} gives a batch to train on and one to hold out, such as held_out(inputs, "
                f"targets) makes of tensors; got {_told(found)}."
            )
        return found[0], found[1]

    def _problem(
        self,
        model: nn.Module,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        data: Path | None,
        examples: int | None,
    ) -> ExampleProblem:
        train, heldout = self._loaded(data)
        train = train.take(slice(0, examples))
        if self.start is not None:
            with in_parts_of(self.name):
                self.start(model, train)
        train, heldout = (batch.to(device, dtype) for batch in (train, heldout))
        redraw, count = self.redraw, len(train)
        return ExampleProblem(
            self.name, model, train, heldout, self.loss, self.metric, self.image_shape, self.unit,
            None if redraw is None else lambda seed: redraw(count, seed).to(device, dtype),
            self.draw, self.hidden, self.chunk, self.whole,
        )  # fmt: skip
