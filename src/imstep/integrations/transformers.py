"""Hugging Face's ``Trainer`` for optimizers whose step takes a closure."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor


class ClosureTraining:
    """Makes a ``Trainer`` hand its optimizer a closure; put it before the trainer among the bases of a class.

    ``Trainer`` calls ``optimizer.step()`` after the backward pass, which is not enough for a step that evaluates the
    loss several times. Here :meth:`training_step` takes the step itself, with the trainer's own forward and backward
    pass as the closure; the loop's call of ``step()`` has no effect then. The batches of
    ``gradient_accumulation_steps`` enter one step together, as one batch. The loss that is logged is the one before
    the step, and the norm that of its gradient.

    Raises:
        ValueError: the arguments ask for what has no meaning for such optimizers: clipped gradients (``max_grad_norm``
            above 0, which is Hugging Face's default), scaled losses (``fp16``), several devices.

    Example:
        Needs transformers and accelerate; ``model`` and ``data`` are what any Trainer takes::

            arguments = transformers.TrainingArguments("out", max_grad_norm=0, lr_scheduler_type="constant")
            optimizer = imstep.NewtonKrylov.for_batches(model.parameters())
            Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    """

    optimizer: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self.args)  # type: ignore[attr-defined]
        self._parts: list[tuple[Any, Any, Any]] = []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a batch, and take a step on all that were kept where the loop would take one.

        Returns:
            The loss before the step, detached; 0 where there was no step.
        """
        self._parts.append((model, inputs, num_items_in_batch))
        state = self.accelerator.gradient_state
        if not state.sync_gradients:
            return torch.zeros((), device=self.args.device)  # type: ignore[attr-defined]
        parts, self._parts = self._parts, []
        losses: list[Tensor] = []
        evaluate = super().training_step  # type: ignore[misc]

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            losses.append(torch.stack([evaluate(*part) for part in parts]).sum())
            return losses[-1]

        self.optimizer.step(closure)
        state._set_sync_gradients(False)  # accelerate's optimizers then leave the loop's step() without effect
        return losses[0]


class Trainer(ClosureTraining, transformers.Trainer):
    """``transformers.Trainer`` with :class:`ClosureTraining`: takes the same arguments.

    Pass the optimizer as ``optimizers=(optimizer, None)``, or as
    ``optimizer_cls_and_kwargs=(imstep.NewtonKrylov, {})``, which gives biases and normalisation layers no weight decay,
    as Hugging Face does for others. ``learning_rate`` has no effect in either case; what the default schedule does to
    ``lr`` has: it falls to 0. ``lr_scheduler_type="constant"`` leaves it at 1.
    """


def _check(arguments: Any) -> None:
    """Raise for arguments that have no meaning here."""
    if arguments.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={arguments.max_grad_norm} asks the Trainer to clip gradients, which has no meaning for an "
            "optimizer that solves with them and checks the loss. Pass TrainingArguments(max_grad_norm=0); "
            "max_step_norm of the optimizer bounds the length of a step."
        )
    if arguments.fp16:
        raise ValueError(
            "fp16=True scales the loss by a factor that changes from step to step and unscales gradients after the "
            "backward pass, outside the closure. Pass TrainingArguments(bf16=True), which needs no scaling."
        )
    if arguments.n_gpu > 1 or arguments.world_size > 1:
        raise ValueError(
            f"the Trainer would use {max(arguments.n_gpu, arguments.world_size)} devices or processes; losses and "
            "products of several are not added up. Start one process, without torchrun or accelerate launch, that sees "
            "one device, by CUDA_VISIBLE_DEVICES=0. To train the model in several, write the loop yourself, with "
            "NewtonKrylov(..., process_group=torch.distributed.group.WORLD) and MicroBatches; or take Lightning or "
            "Accelerate, with imstep.integrations of these names."
        )
