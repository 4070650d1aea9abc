"""Hugging Face's Accelerate: steps over batches that ``accelerator.accumulate`` gathers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class ClosureStep:
    """Takes one step on all batches of a gradient accumulation, as one batch.

    Where nothing is accumulated, ``optimizer.step(closure)`` of the prepared optimizer does, with
    ``accelerator.backward(loss)`` in the closure. With ``gradient_accumulation_steps`` above 1 it does not: Accelerate
    drops the calls of ``step`` in between, and with them the batches of their closures.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        optimizer: what ``accelerator.prepare`` made of the optimizer.

    Raises:
        ValueError: the accelerator scales losses (``mixed_precision="fp16"``), or runs several processes that are not
            the optimizer's ``process_group``.

    Example:
        Needs accelerate; ``model``, ``optimizer`` and ``loader`` are prepared::

            step = ClosureStep(accelerator, optimizer)
            for inputs, targets in loader:
                with accelerator.accumulate(model):
                    loss = step(lambda x, y: torch.nn.functional.mse_loss(model(x), y), inputs, targets)
    """

    def __init__(self, accelerator: Any, optimizer: Any) -> None:
        if accelerator.scaler is not None:
            raise ValueError(
                f"mixed_precision={accelerator.mixed_precision!r} scales the loss by a factor that changes from step "
                "to step. Use Accelerator(mixed_precision='bf16'), which needs no scaling."
            )
        if accelerator.num_processes != getattr(getattr(optimizer, "optimizer", None), "processes", 1):
            raise ValueError(
                f"Accelerate runs {accelerator.num_processes} processes, and the optimizer does not add up what they "
                "find. Build it after the Accelerator, with process_group=torch.distributed.group.WORLD, which is None "
                "in one process; or start one: accelerate launch --num_processes 1."
            )
        self._accelerator, self._optimizer = accelerator, optimizer
        self._parts: list[Callable[[], Tensor]] = []

    def __call__(self, loss: Callable[..., Tensor], *batch: Any) -> Tensor | None:
        """Keep a batch; take the step where Accelerate would.

        Args:
            loss: the loss as a function of the batch, without a backward pass.
            *batch: its arguments. They are kept; what ``loss`` reads elsewhere, such as a variable of the loop, has
                changed when it is called again.

        Returns:
            The mean loss of the batches before the step, detached; None where there was no step.
        """
        self._parts.append(partial(loss, *batch))
        if not self._accelerator.sync_gradients:
            return None
        parts, self._parts = self._parts, []
        means: list[Tensor] = []

        def closure() -> Tensor:
            self._optimizer.zero_grad()
            values = []
            for part in parts:  # one graph at a time
                value = part()
                self._accelerator.backward(value)
                values.append(value.detach())
            means.append(torch.stack(values).mean())
            return means[-1]

        self._optimizer.step(closure)
        return means[0]
