"""Any other function, by PyTorch's forward mode over forward mode, direction by direction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from imstep.complexstep.generators import Generators
from imstep.complexstep.scripted import SCRIPTED, by_operators
from imstep.pde.jet import Combination, ExpansionError, Jet, rebuilt, resolved, rule, shared

_WRONG = {
    *("instance_norm", "native_layer_norm", "native_batch_norm", "linear_cross_entropy"),
    *("det", "logdet", "slogdet", "linalg_det", "linalg_slogdet", "cholesky", "linalg_cholesky", "linalg_cholesky_ex"),
    *("linalg_eigh", "linalg_eigvalsh", "linalg_householder_product", "linalg_solve", "linalg_solve_ex"),
    *("linalg_pinv", "pinverse", "linalg_tensorsolve"),
}
"""Functions of which PyTorch 2.13's forward mode over forward mode returns a wrong second derivative."""


@rule("any")
def _anything(func: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(func, SCRIPTED):  # their optimised plans lose derivatives, in silence
        func = partial(by_operators, func)
    return by_forward_mode(func, args, kwargs)


def by_forward_mode(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Any function, by PyTorch's forward mode twice, direction by direction.

    Raises:
        ExpansionError: the function's outputs are no tensors that could carry derivatives.
    """
    name = getattr(function, "__name__", "a function")
    if name in _WRONG:
        raise ExpansionError(
            f"{name} has no rule here, and PyTorch's own second forward derivative of it is wrong. "
            "Compute it of tensors that do not depend on the points, or use nested torch.autograd.grad for this field."
        )
    leaves, form = tree_flatten((args, kwargs), is_leaf=lambda t: isinstance(t, Jet))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Jet)]
    jets = [leaves[i] for i in at]
    combination = shared(*jets)
    if any(isinstance(part, Jet) for jet in jets for part in (jet.value, jet.first, jet.second)):
        return _of_jets_of_jets(function, leaves, form)
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
            chosen = lambda *a, **k: function(*a, **k)[n]
            chosen.__name__ = name
            return by_forward_mode(chosen, args, kwargs)

        return rebuilt(shown, [part(n) for n in range(len(shown))])
    try:
        return _carried(call, shown, jets, combination)
    except NotImplementedError as error:
        raise ExpansionError(
            f"{name} has no rule here, and PyTorch has no forward derivatives of it ({str(error).splitlines()[0]}). "
            "Compute it of tensors that do not depend on the points, or use nested torch.autograd.grad for this field."
        ) from error


def _carried(call: Callable[..., Tensor], shown: Tensor, jets: list[Jet], combination: Combination) -> Jet:
    values = tuple(_spread_out(resolved(jet.value)) for jet in jets)
    directions = [tuple(_spread_out(jet.first[i]) for jet in jets) for i in range(len(jets[0].first))]
    along = lambda v: torch.func.jvp(call, values, v)[1]
    if not combination.rows:
        return Jet(shown, torch.stack([along(v) for v in directions]), None, combination)
    twice = [torch.func.jvp(lambda *x, _v=v: torch.func.jvp(call, x, _v)[1], values, v) for v in directions]
    first, bends = (torch.stack(parts) for parts in zip(*twice, strict=True))
    second = combination.of(bends)
    if any(jet.second is not None for jet in jets):
        held = [jet.second if jet.second is not None else torch.zeros_like(jet.value)[None] for jet in jets]
        rows = [tuple(_spread_out(t[min(j, len(t) - 1)]) for t in held) for j in range(combination.rows)]
        second = second + torch.stack([along(v) for v in rows])
    return Jet(shown, first, second, combination)


def _spread_out(t: Tensor) -> Tensor:
    """``t`` with memory for each entry, which forward mode may write over."""
    return t.contiguous() if 0 in t.stride() else t


def _of_jets_of_jets(function: Callable[..., Any], leaves: list[Any], form: Any) -> Any:
    """Within an expansion within another: the inner value and derivatives, as a function that the outer follows."""
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Jet)]
    parts = [part for i in at for part in (leaves[i].value, leaves[i].first, leaves[i].second)]
    combination = shared(*leaves)
    found: list[Any] = []

    def inner(*parts: Any) -> list[Any]:
        filled = list(leaves)
        for n, i in enumerate(at):
            value, first, second = parts[3 * n : 3 * n + 3]
            filled[i] = Jet(value, first, second, combination)
        given, named = tree_unflatten(filled, form)
        results, model = tree_flatten(by_forward_mode(function, given, named), is_leaf=lambda t: isinstance(t, Jet))
        found[:] = [model, results]
        return [torch.cat(_stacked(t)) if isinstance(t, Jet) else t for t in results]

    inner.__name__ = getattr(function, "__name__", "a function")
    packed = by_forward_mode(inner, parts, {})
    model, results = found
    for n, t in enumerate(results):
        if isinstance(t, Jet):
            value, first, *second = packed[n].split([len(part) for part in _stacked(t)])
            packed[n] = Jet(value[0], first, second[0] if second else None, combination)
    return tree_unflatten(packed, model)


def _stacked(jet: Jet) -> list[Tensor]:
    return [jet.value[None], jet.first, *([] if jet.second is None else [jet.second])]


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
