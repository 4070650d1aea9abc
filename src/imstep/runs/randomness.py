"""A run's own stream of random numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["RandomStream"]


class RandomStream:
    """A private copy of the global generators: `with` it, the model draws from the run's own stream."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=self._devices):
            torch.manual_seed(seed)
            self._state = self._read()

    def _read(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        for device in self._devices:
            state["cuda"] = torch.cuda.get_rng_state(device)
        return state

    def _write(self, state: Mapping[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        for device in self._devices:
            torch.cuda.set_rng_state(state["cuda"], device)

    def __enter__(self) -> None:
        self._outside = self._read()
        self._write(self._state)

    def __exit__(self, *error: object) -> None:
        self._state = self._read()
        self._write(self._outside)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = {name: tensor.cpu() for name, tensor in state.items()}
