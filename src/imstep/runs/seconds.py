"""Which seconds a run is told and limited in."""

from __future__ import annotations

import enum
import time

import torch

from imstep.runs.rows import TrainingError

__all__ = ["Seconds"]


class Seconds(enum.Enum):
    """The clock of a run's steps.

    ``WALL`` is the time that passes. ``PROCESSOR`` is the time in which the process computes: what else a machine does
    is not in it, so that runs may go side by side. Both are the same where one thread computes on an idle processor.

    Example:
        >>> Seconds("processor").now() <= Seconds("processor").now()
        True
    """

    WALL = "wall"
    PROCESSOR = "processor"

    def now(self) -> float:
        """Seconds since some moment; differences mean something."""
        return time.perf_counter() if self is Seconds.WALL else time.process_time()

    def check(self, device: torch.device, processes: int) -> None:
        """Refuse a clock that does not show how long a run takes.

        Raises:
            TrainingError: processor seconds of several threads or processes, or of another device than the processor.
        """
        if self is Seconds.WALL:
            return
        threads = torch.get_num_threads()
        words = (
            f"{device} computes" if device.type != "cpu"
            else f"{processes} processes compute together" if processes > 1
            else f"{threads} threads compute" if threads > 1
            else ""
        )  # fmt: skip
        if words:
            raise TrainingError(
                f"processor seconds are those of one thread, and {words}: ask for wall seconds, or for one thread on "
                "the processor (torch.set_num_threads(1))."
            )
