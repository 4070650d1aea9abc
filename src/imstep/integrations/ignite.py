"""PyTorch-Ignite: the factory of supervised trainers, for optimizers whose step takes a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine, _prepare_batch
from torch import Tensor


def create_supervised_trainer(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], Tensor],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., tuple[Any, Any]] = _prepare_batch,
    output_transform: Callable[[Any, Any, Any, Tensor], Any] = lambda x, y, y_pred, loss: loss.item(),
) -> Engine:
    """As ``ignite.engine.create_supervised_trainer``, but each iteration calls ``optimizer.step(closure)``.

    Args:
        model, optimizer, loss_fn: what is trained, how, and on what.
        device, non_blocking, prepare_batch: how a batch becomes inputs and targets.
        output_transform: of inputs, targets, the prediction and the loss before the step, both detached: what becomes
            ``engine.state.output``.

    Returns:
        The engine, not run yet.

    Example:
        Needs pytorch-ignite; ``loader`` gives pairs of inputs and targets::

            trainer = create_supervised_trainer(model, imstep.NewtonKrylov(model.parameters()), torch.nn.MSELoss())
            trainer.run(loader, max_epochs=20)
    """

    def update(engine: Engine, batch: Any) -> Any:
        model.train()
        x, y = prepare_batch(batch, device=device, non_blocking=non_blocking)
        evaluations: list[tuple[Tensor, Tensor]] = []

        def closure() -> Tensor:
            prediction = model(x)
            loss = loss_fn(prediction, y)
            if not evaluations:  # later ones are at points that the step tries
                evaluations.append((prediction.detach(), loss.detach()))
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        return output_transform(x, y, *evaluations[0])

    return Engine(update)
