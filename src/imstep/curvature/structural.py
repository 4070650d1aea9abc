"""Damping of what a recurrent network's states do, in place of what its parameters do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep.curvature.added import with_term


class StructuralDamping:
    """Adds a term to a loss that is zero with a gradient of zero at every point, and whose curvature is μ JᵀJ/N.

        A + μ JᵀJ/N,   J = ∂h/∂w, of all N entries h of the hidden states

    A small step of a recurrent network's parameters may change its states beyond what a quadratic model holds for:
    changes are compounded from time to time. Plain damping keeps parameters from moving, this keeps states from it.
    The term is ½ μ times the mean square of h - h.detach(): what does not depend on the parameters is no part of its
    derivatives, and both Hessian and Gauss-Newton matrix come to the above, exactly.

    Args:
        modules: whose outputs are the states: ``nn.RNN``, ``nn.GRU``, ``nn.LSTM``, or cells that a loop calls; of a
            tuple the first counts.
        weight: μ >= 0; or a function of nothing that returns it, such as ``lambda: 10 * optimizer.last_step.damping``,
            for one in proportion to λ.

    Raises:
        ValueError: the weight is negative or not finite; no modules.

    Cost: products with N outputs more; no evaluation.

    Source: Martens and Sutskever, ICML 2011, section 4, with squared distances of states.

    Example:
        >>> from imstep import methods
        >>> rnn, x = nn.RNN(2, 3), torch.ones(5, 1, 2)
        >>> damped = StructuralDamping(rnn, weight=0.1)
        >>> optimizer = methods.hessian_free(rnn.parameters())
        >>> loss = optimizer.step(damped(lambda: (rnn(x)[0][-1] - 0.5).square().mean()))
    """

    def __init__(self, *modules: nn.Module, weight: float | Callable[[], float]) -> None:
        if not modules:
            raise ValueError("structural damping is of modules whose outputs are hidden states: name at least one.")
        self._modules, self._weight = modules, weight
        if not callable(weight):
            _checked(weight)

    def __call__(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with the term; it must evaluate a module, and return the loss or call ``backward()`` on it.

        Raises:
            ValueError: when it is evaluated: it has evaluated no module.
        """

        def damped() -> Any:
            states: list[Tensor] = []
            hooks = [module.register_forward_hook(_taking(states)) for module in self._modules]
            try:
                return with_term(closure, lambda: self._term(states)) if torch.is_grad_enabled() else closure()
            finally:
                for hook in hooks:
                    hook.remove()

        return damped

    def _term(self, states: list[Tensor]) -> Tensor:
        if not states:
            raise ValueError(
                "structural damping is of the states of modules that the closure has not evaluated, or with no "
                "parameter that requires gradients. Name the modules that the model does evaluate."
            )
        whole = torch.cat([state.flatten() for state in states])
        weight = _checked(self._weight() if callable(self._weight) else self._weight)
        return weight / 2 * F.mse_loss(whole, whole.detach())


def _taking(states: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that takes in what a module returns."""

    def take(module: nn.Module, arguments: Any, output: Any) -> None:
        while isinstance(output, tuple):  # a PackedSequence is one, too, its data first
            output = output[0]
        if output.requires_grad:
            states.append(output)

    return take


def _checked(weight: float) -> float:
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight, the share of structural damping, is at least 0 and finite, got {weight}.")
    return weight
