"""Batches that grow with the variance of their gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from imstep.curvature.processes import Processes
from imstep.globalization import NormTest
from imstep.optim.record import StepRecord

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GrowingBatches(Sampler[list[int]]):
    """A ``batch_sampler`` for PyTorch's ``DataLoader`` whose batches grow when their gradients become too noisy.

    An epoch is a permutation of the examples; batches are cut from it at the size of the moment, what is left of the
    epoch being shared out evenly. Iteration goes on where it was left, also after a resumption.

    Args:
        examples: how many there are, >= 1.
        size: examples of the first batches, >= 1.
        test: says when, and how far, batches grow.
        largest: size at which growth ends, >= size; None for all examples.
        window: measurements that one decision is made from, >= 1.
        seed: of the permutations; the global random state is left alone.
        process_group: whose processes share out each batch, for an optimizer with the same: iteration then yields this
            process's part, one example or more. The numbers above are those of whole batches.

    Attributes:
        size: examples a batch now has, at most, in all processes together.

    Raises:
        ValueError: a number is out of range, or differs between processes.

    Cost: none of its own; measuring the variance takes a backward pass each time (``variance_every``).

    Source: Byrd, Chin, Nocedal and Wu, Math. Program. 134 (2012), 127-155; to decide from a mean over several batches
        is our choice.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from imstep import NewtonKrylov
        >>> data = TensorDataset(torch.randn(200, generator=torch.Generator().manual_seed(0)))
        >>> w = torch.nn.Parameter(torch.tensor(3.0))
        >>> optimizer = NewtonKrylov.for_batches([w], variance_every=1)
        >>> batches = GrowingBatches(len(data), size=10)
        >>> for _ in range(3):  # epochs
        ...     for (x,) in DataLoader(data, batch_sampler=batches):
        ...         loss = optimizer.step(lambda: (w - x).square().mean())
        ...         batches.observe(optimizer.last_step, len(x))
        >>> batches.size > 50  # the gradient vanishes at the mean, its variance does not
        True
    """

    def __init__(
        self,
        examples: int,
        size: int,
        *,
        test: NormTest | None = None,
        largest: int | None = None,
        window: int = 5,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        largest = examples if largest is None else largest
        if not 1 <= size <= largest <= examples:
            raise ValueError(
                f"a batch needs 1 <= size <= largest <= examples, got size {size}, largest {largest} "
                f"and {examples} examples."
            )
        if window < 1:
            raise ValueError(f"window, the measurements that a decision is made from, is at least 1, got {window}.")
        self._processes = Processes.of(process_group)
        self._rank, self._count_of = (0, 1) if self._processes is None else (self._processes.rank, self._processes.size)
        if largest < self._count_of:
            raise ValueError(
                f"batches of at most {largest} examples leave nothing to some of {self._count_of} processes. Let "
                "largest, and the number of examples, be as many or more, or start fewer."
            )
        self._agreed((examples, size, largest, window, seed))
        self.size = size
        self._examples, self._largest, self._window = examples, largest, window
        self._test = test or NormTest()
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_start, self._position = self._generator.get_state(), 0
        self._variance, self._squared_norm, self._count = 0.0, 0.0, 0

    def __len__(self) -> int:
        """Batches left in the epoch, at the present size."""
        left = self._examples - self._position
        return max(1, min(math.ceil(left / self.size), left // self._count_of))

    def __iter__(self) -> Iterator[list[int]]:
        """What is left of the epoch, as lists of positions; of several processes the part of this one."""
        self._generator.set_state(self._epoch_start)
        order = torch.randperm(self._examples, generator=self._generator).tolist()
        left = True
        while left:
            end = self._position + math.ceil((self._examples - self._position) / len(self))
            batch, left = order[self._position : end], end < self._examples
            # Moved on before the batch is given away: a state saved after its step says what comes next.
            self._position = end if left else 0
            if not left:
                self._epoch_start = self._generator.get_state()
            yield batch[len(batch) * self._rank // self._count_of : len(batch) * (self._rank + 1) // self._count_of]

    def observe(self, record: StepRecord, examples: int) -> None:
        """Take in what a step has measured, and grow if it is time to; a step that measured nothing is passed over.

        Worker processes fetch batches ahead; these keep the size that they were fetched at.

        Args:
            record: of the step.
            examples: of the batch that its curvature was taken from; of several processes in this one. They are added
                up, so that all call this.
        """
        if math.isnan(record.gradient_variance):
            return
        if self._processes is not None:
            examples = sum(self._processes.gather(lambda: examples))
        self._variance += record.gradient_variance * examples
        self._squared_norm += record.gradient_norm**2
        self._count += 1
        if self._count == self._window:
            wanted = self._test.size(self.size, self._variance / self.size, self._squared_norm)
            self.size = min(wanted, self._largest)
            self._variance, self._squared_norm, self._count = 0.0, 0.0, 0

    def _agreed(self, numbers: tuple[int, ...]) -> None:
        """Raise where they differ between processes."""
        every = [numbers] if self._processes is None else self._processes.gather(lambda: numbers)
        if len(set(every)) > 1:
            raise ValueError(
                f"processes cut batches by different numbers (examples, size, largest, window, seed): {every}. Give "
                "all the same, those of whole batches."
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs for the same batches: numbers and a tensor."""
        return {
            "examples": self._examples,
            "size": self.size,
            "epoch_start": self._epoch_start,
            "position": self._position,
            "variance": self._variance,
            "squared_norm": self._squared_norm,
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; arguments are those given to the constructor.

        Raises:
            ValueError: the state is of another number of examples.
        """
        if state["examples"] != self._examples:
            raise ValueError(
                f"this state is of batches from {state['examples']} examples, these are from {self._examples}. "
                "Load it where the same data are."
            )
        self.size, self._position = state["size"], state["position"]
        self._epoch_start = state["epoch_start"].cpu()
        self._variance, self._squared_norm = state["variance"], state["squared_norm"]
        self._count = state["count"]
