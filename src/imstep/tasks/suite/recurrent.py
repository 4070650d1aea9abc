"""Long-range recurrent problems: what is told early in a sequence decides what is to be said at its end.

Source: Hochreiter and Schmidhuber, Neural Computation 1997; set up for second-order training by Martens and Sutskever,
ICML 2011, and with the initialisation below by Sutskever, Martens, Dahl and Hinton, ICML 2013, Tables 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from imstep.tasks.base import Metric, TaskError
from imstep.tasks.examples import Batch, ExampleTask

__all__ = ["TASKS", "Recurrent", "addition", "five_bits", "multiplication", "temporal_order", "twenty_bits"]

UNITS = 100
INCOMING = 15
"""Recurrent weights of a unit that are not zero at first."""
SPECTRAL_RADIUS = 1.1
SCALE = 0.1
"""Of readout weights, and of input weights where letters are told."""
OF_NUMBERS = 0.01
"""Of input weights where numbers are told: most do not matter, and would drown those that do."""
TOLERANCE = 0.04
"""An answer further off counts as wrong (Hochreiter and Schmidhuber)."""
SEQUENCES = 1000
SHORTEST = 24
BUDGET = 3000.0

Redraw = Callable[[int, int], Batch]


class Recurrent(nn.Module):
    """A layer of tanh units that takes inputs less their mean, and a linear readout of its states.

    Args:
        inputs, outputs: channels in and out.
        every: whether there is an output at every time, (k, outputs, T), or at the last alone, (k, outputs).
        scale: of input weights.

    Inputs are (k, T, inputs). Of the recurrent weights of a unit 15 are drawn from a normal distribution, the others
    are zero, and the matrix is scaled to a spectral radius of 1.1; input weights are `scale` times normal, readout
    weights 0.1 times, biases zero.
    """

    mean: Tensor

    def __init__(self, inputs: int, outputs: int, *, every: bool, scale: float = SCALE) -> None:
        super().__init__()
        self.layer = nn.RNN(inputs, UNITS, batch_first=True)
        self.readout = nn.Linear(UNITS, outputs)
        self.every = every
        self.register_buffer("mean", torch.zeros(inputs))
        with torch.no_grad():
            kept = torch.rand(UNITS, UNITS).argsort(1) < INCOMING
            recurrent = torch.randn(UNITS, UNITS) * kept
            radius = torch.linalg.eigvals(recurrent.double()).abs().max()
            for name, weight in self.named_parameters():
                weight.normal_(0, SCALE) if "weight" in name else weight.zero_()
            own = dict(self.layer.named_parameters())
            own["weight_hh_l0"].copy_(recurrent * (SPECTRAL_RADIUS / radius))
            own["weight_ih_l0"].mul_(scale / SCALE)

    def forward(self, sequences: Tensor) -> Tensor:
        states = self.layer(sequences - self.mean)[0]
        return self.readout(states).transpose(1, 2) if self.every else self.readout(states[:, -1])


def _begin(model: Recurrent, train: Batch) -> None:
    """Let the readout say, before anything is known, the mean of the targets, or how often each letter comes.

    The mean of inputs is taken away: what is the same at all times drives states to where they forget.
    """
    targets, bias = train.targets, model.readout.bias
    with torch.no_grad():
        model.mean.copy_(train.inputs.mean((0, 1)))
        if targets.is_floating_point():
            bias.copy_(targets.mean(0))
        else:
            counts = torch.bincount(targets.flatten(), minlength=len(bias)) + 1.0  # one that never came may come
            bias.copy_((counts / counts.sum()).log())


def addition(length: int) -> ExampleTask:
    """The sum of the two marked numbers of a sequence of `length` to 1.1 `length` numbers; a task.

    >>> addition(40).build(0).data
    '1,000 sequences redrawn each epoch (1,000 held out)'
    """
    return _arithmetic("addition", length, "sum", torch.add)


def multiplication(length: int) -> ExampleTask:
    """The product of the two marked numbers of a sequence of `length` to 1.1 `length` numbers; a task."""
    return _arithmetic("multiplication", length, "product", torch.mul)


def _arithmetic(name: str, length: int, word: str, combine: Callable[[Tensor, Tensor], Tensor]) -> ExampleTask:
    return _task(
        f"{name}-{length}",
        f"{name.capitalize()} problem, T = {length}",
        f"The {word} of the two marked of {length} to {length + length // 10} numbers in [0, 1]; 100 recurrent tanh "
        f"units; mean squared error. Metric: share of answers off by more than {TOLERANCE}; below 0.01 is solved.",
        partial(Recurrent, 2, 1, every=False, scale=OF_NUMBERS),
        nn.MSELoss(),
        Metric("wrong answers", lambda outputs, targets: (outputs - targets).abs()[:, 0] > TOLERANCE),
        partial(_marked_numbers, combine, _checked(length)),
    )


def temporal_order(length: int) -> ExampleTask:
    """Which of two letters came first and which second, among `length` to 1.1 `length` others; a task."""
    return _task(
        f"temporal-order-{length}",
        f"Temporal order problem, T = {length}",
        f"XX, XY, YX or YY: two letters among {length} to {length + length // 10} of four others; 100 recurrent tanh "
        "units; cross entropy. Metric: share of wrong answers; below 0.01 is solved.",
        partial(Recurrent, 6, 4, every=False),
        nn.CrossEntropyLoss(),
        Metric("wrong answers", lambda outputs, targets: outputs.argmax(1) != targets),
        partial(_letters, _checked(length)),
    )


def five_bits(length: int) -> ExampleTask:
    """Five bits to be said again after `length` steps: all 32 sequences there are, for every step; a task."""
    return _memory("memory-5bit", length, 2, 5, "5 bits")


def twenty_bits(length: int) -> ExampleTask:
    """Ten of five letters to be said again after `length` steps; a task."""
    return _memory("memory-20bit", length, 5, 10, "10 of 5 letters")


def _memory(name: str, length: int, letters: int, said: int, words: str) -> ExampleTask:
    every = letters**said <= SEQUENCES
    make = partial(_all_recalls if every else _recalls, letters, said, _checked(length))
    return _task(
        f"{name}-{length}",
        f"{'Five' if said == 5 else 'Twenty'}-bit memory problem, T = {length}",
        f"{words}, to be said again after {length} steps; 100 recurrent tanh units; cross entropy of all steps. "
        "Metric: share of sequences with a wrong letter; below 0.01 is solved.",
        partial(Recurrent, letters + 2, letters + 1, every=True),
        nn.CrossEntropyLoss(),
        Metric("wrong sequences", lambda outputs, targets: (outputs.argmax(1) != targets).any(1)),
        make,
        redrawn=not every,
    )


def _task(
    name: str,
    title: str,
    description: str,
    model: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    metric: Metric,
    make: Redraw,
    redrawn: bool = True,
) -> ExampleTask:
    return ExampleTask(
        name, title, description, partial(_load, make), model, loss, metric, unit="sequences",
        redraw=make if redrawn else None, hidden=lambda model: (model.layer,), budget=BUDGET,
        start=_begin,
    )  # fmt: skip


def _checked(length: int) -> int:
    if length < SHORTEST:
        raise TaskError(f"T = {length}: these problems are about what was long ago; give at least {SHORTEST}.")
    return length


def _load(make: Redraw, data: Path | None) -> tuple[Batch, Batch]:
    """What losses are reported on; no step sees either where sequences are redrawn."""
    return make(SEQUENCES, 1), make(SEQUENCES, 2)


def _marked_numbers(combine: Callable[[Tensor, Tensor], Tensor], length: int, count: int, seed: int) -> Batch:
    """(count, 1.1 length, 2) numbers and marks; one of the first ten and one of the first half are marked.

    Sequences end together; shorter ones begin with zeros, which leave the first state as it is.
    """
    random = Generator().manual_seed(seed)
    start = torch.randint(0, length // 10 + 1, (count,), generator=random)
    numbers = torch.rand(count, length + length // 10, generator=random)
    numbers *= torch.arange(numbers.shape[1]) >= start[:, None]
    first = torch.randint(0, 10, (count,), generator=random)
    second = torch.randint(0, length // 2 - 2, (count,), generator=random)
    second += second >= first
    marks = torch.zeros_like(numbers)
    chosen = [(start + place)[:, None] for place in (first, second)]
    for place in chosen:
        marks.scatter_(1, place, 1.0)
    return Batch(torch.stack([numbers, marks], 2), combine(*(numbers.gather(1, place) for place in chosen)))


def _letters(length: int, count: int, seed: int) -> Batch:
    """(count, 1.1 length, 6): letters, the last two of which count, in the second and in the sixth tenth."""
    random = Generator().manual_seed(seed)
    start = torch.randint(0, length // 10 + 1, (count,), generator=random)
    total, tenth = length + length // 10, length // 10
    letters = torch.randint(0, 4, (count, total), generator=random)
    which = torch.randint(0, 2, (count, 2), generator=random)
    for at, earliest in enumerate((tenth, length // 2)):
        place = start + earliest + torch.randint(0, tenth, (count,), generator=random)
        letters.scatter_(1, place[:, None], 4 + which[:, at : at + 1])
    told = F.one_hot(letters, 6).float() * (torch.arange(total) >= start[:, None])[..., None]
    return Batch(told, 2 * which[:, 0] + which[:, 1])


def _recalls(letters: int, said: int, length: int, count: int, seed: int) -> Batch:
    return _recall(torch.randint(0, letters, (count, said), generator=Generator().manual_seed(seed)), letters, length)


def _all_recalls(letters: int, said: int, length: int, count: int, seed: int) -> Batch:
    return _recall(torch.cartesian_prod(*[torch.arange(letters)] * said), letters, length)


def _recall(message: Tensor, letters: int, length: int) -> Batch:
    """The message, `length` blanks of which the last is a cue, and blanks while it is to be said again."""
    count, said = message.shape
    blank, cue = letters, letters + 1
    told = torch.full((count, 2 * said + length), blank)
    told[:, :said], told[:, said + length - 1] = message, cue
    targets = torch.full_like(told, blank)
    targets[:, -said:] = message
    return Batch(F.one_hot(told, letters + 2).float(), targets)


TASKS = (
    addition(80),
    addition(150),
    multiplication(80),
    multiplication(150),
    temporal_order(80),
    five_bits(200),
    twenty_bits(80),
)
