"""PINA, whose labelled tensors are made in a way that PyTorch allows in no dispatch mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pina import LabelTensor
from pina.optim import TorchOptimizer as Wrapper
from torch import Tensor
from torch.optim import Optimizer


class TorchOptimizer(Wrapper):
    """``pina.optim.TorchOptimizer`` for the optimizers of imstep; takes the same arguments.

    In place of a class there may be a function of the parameters and options, as ``NewtonKrylov.for_batches`` and those
    of :mod:`imstep.methods` are; PINA itself takes classes alone.

    PINA makes a ``LabelTensor`` of a tensor by its constructor, which PyTorch refuses while operators are observed, as
    the complex step does. Making the first such optimizer lets ``LabelTensor`` use ``Tensor.as_subclass`` instead,
    which has the same result.

    Example:
        Needs pina-mathlab; ``problem`` and ``model`` are those of any solver::

            solver = PINN(problem, model, optimizer=TorchOptimizer(imstep.LeastSquares))
            Trainer(solver, max_epochs=50, accelerator="cpu", callbacks=[StepMonitor()]).train()

        with :class:`~imstep.integrations.lightning.StepMonitor`, since PINA's trainer is Lightning's.
    """

    def __init__(self, optimizer_class: Callable[..., Optimizer], **kwargs: Any) -> None:
        function = callable(optimizer_class) and not isinstance(optimizer_class, type)
        super().__init__(Optimizer if function else optimizer_class, **kwargs)
        self.optimizer_class = optimizer_class
        if LabelTensor.__new__ is not _labelled:
            LabelTensor.__new__ = _labelled


def _labelled(cls: type, x: Any, labels: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``LabelTensor.__new__`` returns."""
    if isinstance(x, LabelTensor):
        return x
    return x.as_subclass(cls) if isinstance(x, Tensor) else Tensor.__new__(cls, x, *args, **kwargs)
