"""The processes of one run, where ``torchrun`` has started several: all train, the first alone writes and prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from imstep.curvature.processes import OtherProcessError, Processes
from imstep.runs.rows import TrainingError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ALONE", "Peers", "joined", "launched"]

_T = TypeVar("_T")


class Peers:
    """What the processes of a run agree on; all call its methods together.

    Args:
        group: of ``torch.distributed``; None for one process.

    Attributes:
        group: the same; None where there is one process.
        size: how many processes there are.
        first: whether this is the one that writes and prints.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._processes = Processes.of(group)
        self.group = None if self._processes is None else group
        self.size = 1 if self._processes is None else self._processes.size
        self.rank = 0 if self._processes is None else self._processes.rank
        self.first = self.rank == 0

    def together(self, own: Callable[[], _T]) -> _T:
        """What ``own`` returns here; where it fails in one process, all fail, and the first is the one to say why.

        Raises:
            OtherProcessError: ``own`` failed in another process, or in this one, which is not the first.
        """
        if self._processes is None:
            return own()
        found: list[_T] = []
        try:
            self._processes.gather(lambda: found.append(own()))
        except (ValueError, OSError, RuntimeError) as error:
            if self.first or isinstance(error, OtherProcessError):
                raise
            raise OtherProcessError(str(error)) from error
        return found[0]

    def any(self, own: bool) -> bool:
        """Whether it is so in any process."""
        return own if self._processes is None else self._total(float(own)) > 0

    def of_first(self, number: float) -> float:
        """The number that the first process has."""
        return number if self._processes is None else self._total(number if self.first else 0.0)

    def _total(self, number: float) -> float:
        assert self._processes is not None
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        own = torch.tensor([number], dtype=torch.float64, device=device)
        return float(self._processes.sum(lambda: own, 1, own))


ALONE = Peers()


def launched() -> bool:
    """Whether ``torchrun`` has started this process, with others."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextmanager
def joined(device: str) -> Iterator[Peers]:
    """The processes that ``torchrun`` has started, in a group: gloo on CPUs, NCCL on GPUs, of which each takes its own.

    Raises:
        TrainingError: the device is one of several, or this machine has fewer GPUs than processes.
    """
    if not launched():
        yield ALONE
        return
    if dist.is_initialized():  # by a program that calls the command
        yield Peers(dist.group.WORLD)
        return
    kind, _, number = device.partition(":")
    if kind == "cuda":
        _take_gpu(number)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    yield Peers(dist.group.WORLD)
    dist.destroy_process_group()  # not where something failed: others may not come to it any more


def _take_gpu(number: str) -> None:
    own, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number:
        raise TrainingError(
            f"device='cuda:{number}' is one GPU, and torchrun has started several processes. Give --device cuda: each "
            "process takes one of its own."
        )
    if own >= there:
        raise TrainingError(
            f"torchrun has started {os.environ['LOCAL_WORLD_SIZE']} processes here, and this machine has {there} GPUs. "
            f"Start as many processes as there are GPUs, or leave --device cuda out."
        )
    torch.cuda.set_device(own)
