"""The global random number generators that an evaluation may draw from: PyTorch's own, of the CPU and of devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Generators:
    """The states of the CPU's generator and of those of devices, to draw the same numbers again.

    Args:
        devices: on which an evaluation may draw; the CPU is always among them.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._others: list[tuple[Any, torch.device, Tensor]] = []
        for device in {d for d in devices if d.type not in ("cpu", "meta")}:
            module = torch.get_device_module(device)
            # MPS has one device, and takes no argument for it.
            state = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
            self._others.append((module, device, state))

    def restore(self) -> None:
        """Put the generators back to these states."""
        torch.set_rng_state(self._cpu)
        for module, device, state in self._others:
            module.set_rng_state(state, *(() if device.type == "mps" else (device,)))
