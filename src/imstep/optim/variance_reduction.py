"""Losses of batches whose gradients have less variance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.gradients import gradients
from imstep.complexstep.kernels import plain_attention
from imstep.curvature.added import with_term
from imstep.curvature.frozen import FrozenClosure
from imstep.curvature.parameters import ParameterVector, as_reals


class VarianceReduction:
    """Adds a linear term to the loss of a batch, so that its gradient is that of SVRG.

        f_B(w) + (∇f(w̃) - ∇f_B(w̃))ᵀ (w - w̃)

    w̃ is a snapshot of the parameters, taken anew every few batches, and f the loss of all data. The gradient at w is
    ∇f_B(w) - ∇f_B(w̃) + ∇f(w̃), whose variance vanishes as w and w̃ meet; curvature is that of f_B. Since it is a
    function like any other, every optimizer with a closure can step on it, trials included.

    Args:
        params: the parameters; None for those of the optimizer that it is given to.
        full: returns the loss of all data, a mean as that of the batches is.
        every: batches between two snapshots, >= 1: about those of two epochs.

    Attributes:
        gradients: of batches, taken so far; one of all data counts as ``every / 2`` of them, as if ``every`` were the
            batches of two epochs. An optimizer that was given this as ``variance_reduction`` counts them in its cost.

    Raises:
        ValueError: every is below 1; at a call: there are no parameters.
        TypeError: at a call: no function.

    Cost: a gradient of the batch each time, and of all data for a snapshot. These leave random numbers and buffers as
        they were. Models with dropout or batch statistics evaluate other functions there, and are not for it.

    Source: Johnson and Zhang, NeurIPS 2013; the term, which is the same to any order, is our choice.

    Example:
        >>> from imstep import methods
        >>> w, x = torch.nn.Parameter(torch.zeros(1)), torch.arange(12.0).reshape(4, 3)
        >>> reduced = VarianceReduction([w], full=lambda: (w - x).square().mean(), every=8)
        >>> optimizer = methods.newton_cg([w], variance_reduction=reduced)
        >>> for batch in x:
        ...     loss = optimizer.step(lambda: (w - batch).square().mean())
        >>> w.detach()
        tensor([5.5000])
    """

    def __init__(self, params: Iterable[Tensor] | None, full: Callable[[], Tensor], every: int) -> None:
        if every < 1:
            raise ValueError(f"every, the batches between two snapshots, is at least 1, got {every}.")
        self._parameters = None if params is None else ParameterVector(params)
        self._full, self._every = full, every
        self._batches = self.gradients = 0
        self._at: list[Tensor] = []
        self._mean: list[Tensor] = []

    def __call__(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of a batch with the term; to be called once for each batch, where the step begins."""
        if not callable(closure):
            raise TypeError(
                f"variance reduction takes the closure of a batch, got a {type(closure).__name__}. "
                "For a batch in pieces pass MicroBatches(function, batches)."
            )
        parameters = self._parameters
        if parameters is None:
            raise ValueError("no parameters were given. Pass this to an optimizer as variance_reduction, or name them.")
        if self._batches % self._every == 0:
            self._at = parameters.snapshot()
            self._mean = _gradient(self._full, parameters)
            self.gradients += max(1, self._every // 2)
        here = parameters.snapshot()
        parameters.restore(self._at)
        try:
            own = _gradient(closure, parameters)
        finally:
            parameters.restore(here)
        self._batches, self.gradients = self._batches + 1, self.gradients + 1
        terms = [(mean - g, at) for mean, g, at in zip(self._mean, own, self._at, strict=True)]

        def term() -> Tensor:
            moved = zip(terms, parameters.tensors, strict=True)
            parts = [as_reals(slope) * as_reals(p - at) for (slope, at), p in moved]
            return torch.stack([part.sum() for part in parts]).sum()

        return lambda: with_term(closure, term)

    def state_dict(self) -> dict[str, Any]:
        """The snapshot and the full gradient there, and what was counted."""
        return {"batches": self._batches, "gradients": self.gradients, "at": self._at, "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._batches, self.gradients = state["batches"], state["gradients"]
        self._at, self._mean = list(state["at"]), list(state["mean"])

    def follow(self, parameters: ParameterVector) -> None:
        """Be of these parameters, with a snapshot at the next batch."""
        self._parameters, self._batches = parameters, 0


def _gradient(closure: Callable[[], Any], parameters: ParameterVector) -> list[Tensor]:
    """The gradient; random numbers and buffers are left as they were, so that the step's own evaluations find them."""
    frozen = FrozenClosure(closure, parameters)
    try:
        loss = frozen.loss_with_graph(frozen.watch())
        with plain_attention():  # as in the evaluation, for what a checkpoint runs again
            found = gradients([loss], parameters.tensors)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.tensors, found, strict=True)]
    finally:
        frozen.undo()
