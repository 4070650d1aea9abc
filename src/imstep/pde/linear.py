"""Linear functions of one jet, and what puts jets together or chooses among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imstep.pde.jet import ExpansionError, Jet, mapped, rule, shared, value_of

_LINEAR = (
    *("reshape", "view", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "permute"),
    *("transpose", "t", "T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis", "expand", "expand_as", "repeat"),
    *("tile", "repeat_interleave", "broadcast_to", "flip", "roll", "__getitem__", "select", "narrow", "index_select"),
    *("gather", "take_along_dim", "chunk", "split", "unbind", "tensor_split", "hsplit", "contiguous", "clone", "to"),
    *("sum", "mean", "cumsum", "neg", "negative", "__neg__", "positive", "__pos__", "diagonal", "tril", "triu"),
    *("float", "double", "type_as", "diff", "trace", "adaptive_avg_pool1d", "avg_pool1d"),
    *("real", "imag", "conj", "conj_physical", "resolve_conj", "resolve_neg", "H", "mH", "adjoint"),
    *("view_as_real", "view_as_complex", "cfloat", "cdouble"),
)
_ATTRIBUTES = ("T", "mT", "H", "mH", "real", "imag")


def _register_linear() -> None:
    for name in _LINEAR:

        def apply(input: Any, *args: Any, _name: str = name, **kwargs: Any) -> Any:
            if not isinstance(input, Jet):
                raise ExpansionError(f"{_name} takes a jet as its first argument only.")
            call = (lambda t: getattr(t, _name)) if _name in _ATTRIBUTES else _function(_name)
            return mapped(lambda t: call(t, *args, **kwargs), input)

        rule(name)(apply)


def _function(name: str) -> Callable[..., Any]:
    return getattr(Tensor, name, None) or getattr(torch, name, None) or getattr(F, name)


@rule("cat", "concat", "concatenate")
def _cat(tensors: Any, dim: int = 0) -> Jet:
    return _joined(torch.cat, tensors, dim)


@rule("stack")
def _stack(tensors: Any, dim: int = 0) -> Jet:
    return _joined(torch.stack, tensors, dim)


def _joined(join: Callable[..., Tensor], tensors: Any, dim: int) -> Jet:
    tensors = list(tensors)
    combination = shared(*tensors)
    count = next(len(t.first) for t in tensors if isinstance(t, Jet))
    inner = dim if dim < 0 else dim + 1

    def zeros(t: Any, n: int) -> Tensor:
        return torch.zeros_like(value_of(t)).expand(n, *t.shape)

    first = join([t.first if isinstance(t, Jet) else zeros(t, count) for t in tensors], inner)
    second = None
    if any(isinstance(t, Jet) and t.second is not None for t in tensors):
        rows = combination.rows
        parts = [t.second if isinstance(t, Jet) and t.second is not None else zeros(t, rows) for t in tensors]
        second = join(parts, inner)
    return Jet(join([value_of(t) for t in tensors], dim), first, second, combination)


@rule("dropout")
def _dropout(input: Jet, p: float = 0.5, training: bool = True) -> Tensor:
    if not training or p == 0:
        return input
    return input * F.dropout(torch.ones_like(input.value), p)


@rule("numpy", "__array__")
def _exit(input: Jet, *args: Any) -> Any:
    raise ExpansionError(
        "the field that is expanded turns its values into a NumPy array, where derivatives would be lost. Compute with "
        "torch functions, or call .detach() first to treat the values as constants."
    )


@rule("grad", "backward")
def _reverse_mode(outputs: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    raise ExpansionError(
        "the field that is expanded differentiates by reverse mode within itself, which does not see its derivatives. "
        "Use pde.gradient or another operator of imstep.pde there, or nested torch.autograd.grad for all of it."
    )


@rule("data")
def _data(input: Jet, *args: Any) -> Tensor:
    if args:
        raise ExpansionError(
            "the data of a tensor that carries derivatives are replaced. Compute a new tensor instead."
        )
    return input.value.detach()


@rule("where")
def _where(condition: Tensor, input: Any, other: Any) -> Jet:
    jet = input if isinstance(input, Jet) else other
    return jet.new_zeros(()) + _chosen(condition, input) + _chosen(~condition, other)


@rule("masked_fill")
def _masked_fill(input: Jet, mask: Tensor, value: Any) -> Jet:
    return _where(mask, value, input)


def _chosen(condition: Tensor, t: Any) -> Any:
    """``t`` where the condition holds, else 0, also where t is not finite."""
    if isinstance(t, Jet):
        return mapped(lambda u: torch.where(condition, u, 0.0), t)
    return torch.where(condition, torch.as_tensor(t, device=condition.device), 0.0)


_PLAIN = (
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_tensor", "new_full", "new_empty", "detach"),
)


def _register_plain() -> None:
    for name in _PLAIN:
        call = _function(name)
        rule(name)(lambda x, *args, _call=call, **kwargs: _call(x.value, *args, **kwargs))


_register_linear()
_register_plain()
