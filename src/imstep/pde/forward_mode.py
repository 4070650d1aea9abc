"""Any other function, by PyTorch's forward mode over forward mode, direction by direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from imstep.complexstep.generators import Generators
from imstep.pde.jet import ExpansionError, Jet, rebuilt, resolved, rule, shared

_WRONG = {
    *("instance_norm", "native_layer_norm", "native_batch_norm", "linear_cross_entropy"),
    *("det", "logdet", "slogdet", "linalg_det", "linalg_slogdet", "cholesky", "linalg_cholesky", "linalg_cholesky_ex"),
    *("linalg_eigh", "linalg_eigvalsh", "linalg_householder_product", "linalg_solve", "linalg_solve_ex"),
    *("linalg_pinv", "pinverse", "linalg_tensorsolve"),
}
"""Functions of which PyTorch 2.13's forward mode over forward mode returns a wrong second derivative."""


@rule("any")
def _anything(func: Any, args: Any, kwargs: Any) -> Any:
    return by_forward_mode(func, args, kwargs)


def by_forward_mode(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Any function, by PyTorch's forward mode twice, direction by direction.

    Raises:
        ExpansionError: the function's outputs are no tensors that could carry derivatives.
    """
    if getattr(function, "__name__", "") in _WRONG:
        raise ExpansionError(
            f"{function.__name__} has no rule here, and PyTorch's own second forward derivative of it is wrong. "
            "Compute it of tensors that do not depend on the points, or use nested torch.autograd.grad for this field."
        )
    leaves, form = tree_flatten((args, kwargs), is_leaf=lambda t: isinstance(t, Jet))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Jet)]
    jets = [leaves[i] for i in at]
    combination = shared(*jets)
    draws = _Draws(leaves)

    def call(*values: Tensor) -> Any:
        draws.repeat()
        filled = list(leaves)
        for i, value in zip(at, values, strict=True):
            filled[i] = value
        given, named = tree_unflatten(filled, form)
        return function(*given, **named)

    values = tuple(resolved(jet.value) for jet in jets)
    shown = call(*values)
    if not isinstance(shown, Tensor) or not (shown.is_floating_point() or shown.is_complex()):
        if isinstance(shown, Tensor) or not isinstance(shown, (list, tuple)):
            return shown  # a comparison, a position: no derivative

        def part(n: int) -> Any:
            draws.repeat()
            return by_forward_mode(lambda *a, **k: function(*a, **k)[n], args, kwargs)

        return rebuilt(shown, [part(n) for n in range(len(shown))])
    directions = [tuple(jet.first[i] for jet in jets) for i in range(len(jets[0].first))]
    along = lambda v: torch.func.jvp(call, values, v)[1]
    if not combination.rows:
        return Jet(shown, torch.stack([along(v) for v in directions]), None, combination)
    twice = [torch.func.jvp(lambda *x, _v=v: torch.func.jvp(call, x, _v)[1], values, v) for v in directions]
    first, bends = (torch.stack(parts) for parts in zip(*twice, strict=True))
    second = combination.of(bends)
    if any(jet.second is not None for jet in jets):
        held = [jet.second if jet.second is not None else torch.zeros_like(jet.value)[None] for jet in jets]
        rows = [tuple(t[min(j, len(t) - 1)] for t in held) for j in range(combination.rows)]
        second = second + torch.stack([along(v) for v in rows])
    return Jet(shown, first, second, combination)


class _Draws:
    """What a function draws at random, to be the same in each of its evaluations.

    Args:
        leaves: the arguments of the function, jets and generators among them.
    """

    def __init__(self, leaves: list[Any]) -> None:
        self._shared = Generators(leaf.device for leaf in leaves if isinstance(leaf, Jet))
        self._own = [(leaf, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]

    def repeat(self) -> None:
        """Put the generators back to where they stood before the first evaluation."""
        self._shared.restore()
        for generator, state in self._own:
            generator.set_state(state)
