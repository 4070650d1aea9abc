"""What a closure depends on besides the parameters: random numbers, and tensors that the model overwrites."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class RandomState:
    """The state of all global random number generators that a closure may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._device = device

    def restore(self) -> None:
        """Put the generators back to this state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Writes:
    """Tensors of the model that the closure overwrites: their contents before and after the first evaluation.

    Parameters are not among them, though a closure may overwrite them as well: an embedding with ``max_norm`` does.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = {p.untyped_storage()._cdata for p in parameters}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._after: dict[int, Tensor] = {}

    def before(self, t: Tensor) -> None:
        """Note the whole storage of ``t``, which is about to be overwritten, unless it is known."""
        storage = t.untyped_storage()
        if storage._cdata not in self._before and storage._cdata not in self._parameters:
            whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage)
            self._before[storage._cdata] = whole, whole.clone()

    def keep(self) -> None:
        """Remember the contents after the first evaluation: those that stay."""
        self._after = self.contents()

    def contents(self) -> dict[int, Tensor]:
        """Copies of what the tensors hold now."""
        return {key: whole.clone() for key, (whole, _) in self._before.items()}

    def replace(self, contents: dict[int, Tensor]) -> None:
        """Put the given contents back."""
        for key, saved in contents.items():
            self._before[key][0].copy_(saved)

    def rewind(self) -> None:
        """Put everything back to what it was before the first evaluation."""
        for whole, saved in self._before.values():
            whole.copy_(saved)

    def finish(self, accepted: bool) -> None:
        """Leave the contents as after one evaluation, or as before it."""
        for key, (whole, saved) in self._before.items():
            whole.copy_(self._after.get(key, saved) if accepted else saved)
