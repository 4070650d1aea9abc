"""PyTorch Lightning: logs that fit steps which evaluate the loss several times, and refusals before the first one."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

try:
    import lightning.pytorch as pl
except ImportError:  # the same package under its older name
    import pytorch_lightning as pl

from imstep.optim.stepwise import StepwiseOptimizer


class StepMonitor(pl.Callback):
    """Logs what the optimizer did, and lets a module log once per batch.

    With automatic optimisation a step calls ``training_step`` at the parameters before the step, and again at each
    point that it tries. What ``training_step`` and the hooks after it log would be averaged over all of them. With this
    callback only the first call logs. With manual optimisation ``training_step`` runs once, and logs all that it says.
    After the batch the callback logs ``step/loss``, ``step/new_loss``, ``step/gradient_norm``, ``step/damping``,
    ``step/step_length``, ``step/products``, ``step/trials``, all of ``optimizer.last_step``, and
    ``step/gradient_equivalents``, what all steps have cost so far; of several optimizers ``step-0/loss`` and so on.

    Raises:
        ValueError: when training starts: the Trainer is to clip gradients, to accumulate them, or to scale the loss,
            none of which fits such optimizers; to run on several devices, other than by ``strategy="ddp"`` with an
            optimizer that has their ``process_group``; or to average the weights of a model with batch normalisation
            by ``StochasticWeightAveraging``, which calls the optimizer without a backward pass at the end.

    Example:
        Needs lightning; ``module`` is any ``LightningModule`` with ``configure_optimizers`` returning an optimizer of
        imstep's::

            lightning.Trainer(max_epochs=20, callbacks=[StepMonitor()]).fit(module, loader)
    """

    def __init__(self) -> None:
        self._evaluations = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what does not fit, and stand before the module's ``training_step`` and ``log``."""
        if not any(isinstance(optimizer, StepwiseOptimizer) for optimizer in trainer.optimizers):
            return
        _check(trainer, pl_module)
        evaluate, log = pl_module.training_step, pl_module.log

        @wraps(evaluate)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._evaluations += 1
            return evaluate(*args, **kwargs)

        def once(*args: Any, **kwargs: Any) -> None:
            if self._evaluations <= 1:  # hooks that follow the first evaluation log, too
                log(*args, **kwargs)

        pl_module.training_step, pl_module.log = counted, once

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A first evaluation comes."""
        self._evaluations = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the steps."""
        self._evaluations = 0
        ours = {k: o for k, o in enumerate(trainer.optimizers) if isinstance(o, StepwiseOptimizer)}
        for k, optimizer in ours.items():
            if optimizer.last_step is not None:
                pl_module.log_dict(_figures(optimizer, "step" if len(ours) == 1 else f"step-{k}"), batch_size=1)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its own methods back."""
        self._evaluations = 0
        for name in ("training_step", "log"):
            pl_module.__dict__.pop(name, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Do so after an error, too."""
        self.teardown(trainer, pl_module, "fit")


def _figures(optimizer: StepwiseOptimizer, prefix: str) -> dict[str, float]:
    step = optimizer.last_step
    names = ("loss", "new_loss", "gradient_norm", "damping", "step_length", "products", "trials")
    figures = {f"{prefix}/{name}": float(getattr(step, name)) for name in names}
    return {**figures, f"{prefix}/gradient_equivalents": optimizer.cost.gradient_equivalents}


def _is_a(name: str, thing: Any) -> bool:
    """Whether a thing is of a class of Lightning's, told by name: two packages have it, and both may be installed."""
    return name in (kind.__name__ for kind in type(thing).__mro__)


def _check(trainer: Any, module: Any) -> None:
    """Raise for settings that do not fit."""
    if trainer.gradient_clip_val:
        raise ValueError(
            f"gradient_clip_val={trainer.gradient_clip_val} asks the Trainer to clip gradients, which has no meaning "
            "for an optimizer that solves with them and checks the loss. Leave it out; max_step_norm of the optimizer "
            "bounds the length of a step."
        )
    if trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} adds gradients of batches whose loss a step "
            "could not evaluate again. Leave it out and take larger batches, or split a batch within training_step "
            "and return the sum of the losses."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"precision={trainer.precision!r} scales the loss by a factor that changes from step to step, and calls "
            "step() without a closure. Use precision='bf16-mixed', which needs no scaling."
        )
    averaged = any(_is_a("StochasticWeightAveraging", callback) for callback in trainer.callbacks)
    if averaged and any(isinstance(part, _BatchNorm) for part in module.modules()):
        raise ValueError(
            "StochasticWeightAveraging adds an epoch for the statistics of batch normalisation, at whose end it calls "
            "the optimizer without a backward pass. Use WeightAveraging of the same package in its place."
        )
    ours = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, StepwiseOptimizer)]
    alone, parallel = (_is_a(kind, trainer.strategy) for kind in ("SingleDeviceStrategy", "DDPStrategy"))
    if not (alone or (parallel and all(optimizer.processes == trainer.world_size for optimizer in ours))):
        raise ValueError(
            f"strategy {type(trainer.strategy).__name__} spreads a step over processes, and the optimizer does not add "
            "up what they find. Use strategy='ddp', and build it in configure_optimizers with "
            "process_group=torch.distributed.group.WORLD, which is None in one process; or Trainer(devices=1, "
            "strategy='auto')."
        )
