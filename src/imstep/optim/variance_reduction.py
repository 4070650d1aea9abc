"""Losses of batches whose gradients have less variance."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from imstep.curvature.parameters import ParameterVector


class VarianceReduction:
    """Adds a linear term to the loss of a batch, so that its gradient is that of SVRG.

        f_B(w) + (∇f(w̃) - ∇f_B(w̃))ᵀ (w - w̃)

    w̃ is a snapshot of the parameters, taken anew every few batches, and f the loss of all data. The gradient at w is
    ∇f_B(w) - ∇f_B(w̃) + ∇f(w̃), whose variance vanishes as w and w̃ meet; curvature is that of f_B. Since it is a
    function like any other, every optimizer with a closure can step on it, trials included.

    Args:
        params: the parameters.
        full: returns the loss of all data, a mean as that of the batches is.
        every: batches between two snapshots, >= 1: about those of two epochs.

    Attributes:
        gradients: full gradients taken so far, which no optimizer's cost counts.

    Raises:
        ValueError: every is below 1.

    Cost: a gradient of the batch each time, and of all data for a snapshot. Models with dropout or batch statistics
        evaluate other functions there, and are not for it.

    Source: Johnson and Zhang, NeurIPS 2013; the term, which is the same to any order, is our choice.

    Example:
        >>> from imstep import methods
        >>> w, x = torch.nn.Parameter(torch.zeros(1)), torch.arange(12.0).reshape(4, 3)
        >>> reduced = VarianceReduction([w], full=lambda: (w - x).square().mean(), every=8)
        >>> optimizer = methods.newton_cg([w])
        >>> for batch in x:
        ...     loss = optimizer.step(reduced(lambda: (w - batch).square().mean()))
        >>> w.detach()
        tensor([5.5000])
    """

    def __init__(self, params: Iterable[Tensor], full: Callable[[], Tensor], every: int) -> None:
        if every < 1:
            raise ValueError(f"every, the batches between two snapshots, is at least 1, got {every}.")
        self._parameters, self._full, self._every = ParameterVector(params), full, every
        self._batches = self.gradients = 0
        self._at: list[Tensor] = []
        self._mean: list[Tensor] = []

    def __call__(self, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The closure of a batch with the term; to be called once for each batch, where the step begins."""
        parameters = self._parameters
        if self._batches % self._every == 0:
            self._at = parameters.snapshot()
            self._mean, self.gradients = self._gradient(self._full), self.gradients + 1
        self._batches += 1
        here = parameters.snapshot()
        parameters.restore(self._at)
        try:
            own = self._gradient(closure)
        finally:
            parameters.restore(here)
        terms = [(mean - g, at) for mean, g, at in zip(self._mean, own, self._at, strict=True)]

        def reduced() -> Tensor:
            loss = closure()
            moved = zip(terms, parameters.tensors, strict=True)
            return loss + torch.stack([(slope * (p - at)).sum() for (slope, at), p in moved]).sum()

        return reduced

    def _gradient(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            return list(torch.autograd.grad(loss(), self._parameters.tensors, materialize_grads=True))
