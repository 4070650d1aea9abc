"""Hooks of users on parameters: whether they change gradients, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from imstep.complexstep.islands import unseen

_Noted = tuple[Tensor, Tensor]  # a gradient, and a copy of its values


class HookWatch:
    """Watches what tensor hooks do to the gradients of parameters, within :meth:`watching`.

    A linear hook acts on products alike. Of the gradient that it leaves, a function is known only where it sets entries
    to zero: these are held fixed then.

    Args:
        parameters: whose hooks are watched.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._hooked = [p for p in parameters if p._backward_hooks]
        self._passed: list[tuple[list[_Noted], list[_Noted]]] = [([], []) for _ in self._hooked]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for backward passes."""
        with ExitStack() as stack:
            for p, (before, after) in zip(self._hooked, self._passed, strict=True):
                hooks: Any = p._backward_hooks
                users = dict(hooks)
                hooks.clear()  # autograd runs hooks in the order of their insertion
                stack.callback(p.register_hook(_noting(before)).remove)
                hooks.update(users)
                stack.callback(p.register_hook(_noting(after)).remove)
            yield

    def factors(self) -> list[Tensor | None] | None:
        """By parameter, what hooks multiply the entries of a gradient by, None for 1; None where all are 1.

        Raises:
            ValueError: a hook does something else.
        """
        found = {id(p): _factor(p, *passed) for p, passed in zip(self._hooked, self._passed, strict=True)}
        factors = [found.get(id(p)) for p in self._parameters]
        return factors if any(f is not None for f in factors) else None


def _factor(p: Tensor, before: list[_Noted], after: list[_Noted]) -> Tensor | None:
    # A hook that only looks is not called again; one that returns something may be, where all it sets to zero is zero.
    if all(g is h and same_values(a, b) for (g, a), (h, b) in zip(before, after, strict=True)):
        return None
    factor = _hooked(p, torch.ones_like(p, requires_grad=False))
    for (_, g), (_, h) in zip(before, after, strict=True):
        # At a second point as well: a gradient below a bound is clipped by 1.
        for at, passed in ((g, h), (g + 1, _hooked(p, g + 1))):
            if not torch.allclose(passed, at * factor, rtol=1e-4, atol=1e-6 * float(at.abs().max()), equal_nan=True):
                raise ValueError(
                    f"a hook changes the gradient of a parameter of shape {tuple(p.shape)} by more than a constant "
                    f"factor for each entry, and then there is no function that it is the gradient of. {REMEDY}"
                )
    return None if bool((factor == 1).all()) else factor


def _hooked(p: Tensor, gradient: Tensor) -> Tensor:
    """What the hooks of ``p`` make of a gradient."""
    gradient = gradient.clone()
    with torch.no_grad():
        for hook in list((p._backward_hooks or {}).values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
    return gradient


def mask_of(factors: Tensor) -> Tensor:
    """The factors of hooks, if they are zeros and ones.

    Raises:
        ValueError: they are not.
    """
    if not bool(((factors == 0) | (factors == 1)).all()):
        raise ValueError(
            "a hook multiplies the gradient of a parameter by factors other than 0 and 1, and a step needs the "
            f"gradient of the loss. {REMEDY}"
        )
    return factors


REMEDY = (
    "Remove the hook: max_step_norm of the optimizer bounds the length of a step in place of clipping, a factor "
    "belongs in the loss, and parameters are held fixed by requires_grad=False, entries by a tensor hook that "
    "multiplies by zeros and ones."
)


@contextmanager
def accumulation_watched(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A context for a backward pass; raises if post-accumulate hooks change a gradient."""
    hooked = [p for p in parameters if p._post_accumulate_grad_hooks]
    expected: list[list[_Noted]] = [[] if p.grad is None else [(p.grad, plain_copy(p.grad))] for p in hooked]
    with ExitStack() as stack:
        for p, arrived in zip(hooked, expected, strict=True):
            stack.callback(p.register_hook(_noting(arrived)).remove)
        yield
    for p, noted in zip(hooked, expected, strict=True):
        parts = [copy for _, copy in noted]
        if parts and (p.grad is None or not same_values(plain_copy(p.grad), sum(parts[1:], parts[0]))):
            raise ValueError(f"a post-accumulate-grad hook changes the gradient of a parameter. {REMEDY}")


def plain_copy(t: Tensor) -> Tensor:
    """A copy of the values that no mode sees."""
    with unseen(), _disable_current_modes():
        return t.detach().clone()


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same entries, NaN being the same as NaN."""
    return all_same([a], [b])


def all_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """As :func:`same_values`, of tensors in pairs."""
    with unseen(), _disable_current_modes():
        return all(
            a.layout is not torch.strided  # sparse gradients are refused elsewhere
            or torch.equal(a, b)
            or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
            for a, b in zip(some, others, strict=True)
        )


def _noting(noted: list[_Noted]) -> Callable[[Any], None]:
    return lambda g: None if g is None else noted.append((g, plain_copy(g)))
