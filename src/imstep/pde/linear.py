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
    *("float", "double", "type_as", "trace", "adaptive_avg_pool1d", "avg_pool1d"),
    *("real", "imag", "conj", "conj_physical", "resolve_conj", "resolve_neg", "H", "mH", "adjoint"),
    *("view_as_real", "view_as_complex", "cfloat", "cdouble"),
)
_ATTRIBUTES = ("T", "mT", "H", "mH", "real", "imag")
_LIKE = ("view_as", "reshape_as", "expand_as", "type_as", "to")
"""Those that take another tensor for its form."""


def _register_linear() -> None:
    for name in _LINEAR:

        def apply(input: Any, *args: Any, _name: str = name, **kwargs: Any) -> Any:
            call = (lambda t: getattr(t, _name)) if _name in _ATTRIBUTES else _function(_name)
            if _name in _LIKE:
                args, kwargs = tuple(map(value_of, args)), {key: value_of(t) for key, t in kwargs.items()}
            if isinstance(input, Jet):
                return mapped(lambda t: call(t, *args, **kwargs), input)
            if _name in _LIKE:
                return call(input, *args, **kwargs)
            raise ExpansionError(
                f"{_name} follows derivatives of its first argument only, and another one has them. Give .detach() of "
                "that one, if it says which entries are meant, or compute in another way."
            )

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


@rule("diff")
def _diff(input: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    parts = [t for t in (prepend, input, append) if t is not None]
    whole = input if len(parts) == 1 else _joined(torch.cat, parts, dim)
    return mapped(lambda t: torch.diff(t, n, dim if dim < 0 else dim - whole.dim()), whole)


@rule("type")
def _type(input: Jet, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    return input.value.type() if dtype is None else mapped(lambda t: t.type(dtype, *args, **kwargs), input)


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
def _where(*args: Any, **kwargs: Any) -> Any:
    """The function, (condition, input, other), and the method, (input, condition, other)."""
    if args and (isinstance(args[0], Jet) or args[0].dtype not in (torch.bool, torch.uint8)):
        return _where_each(input=args[0], **dict(zip(("condition", "other"), args[1:], strict=False)), **kwargs)
    return _where_each(*args, **kwargs)


def _where_each(condition: Tensor, input: Any, other: Any) -> Jet:
    condition = condition.bool()
    jet = input if isinstance(input, Jet) else other
    return jet.new_zeros(()) + _chosen(condition, input, jet) + _chosen(~condition, other, jet)


@rule("masked_fill")
def _masked_fill(input: Jet, mask: Tensor, value: Any) -> Jet:
    return _where_each(mask, value, input)


def _chosen(condition: Tensor, t: Any, jet: Jet) -> Any:
    """``t`` where the condition holds, else 0, also where t is not finite."""
    if isinstance(t, Jet):
        return mapped(lambda u: torch.where(condition, u, 0.0), t)
    kind = torch.result_type(jet.value, t)  # a number is not to be rounded to the default dtype
    return torch.where(condition, torch.as_tensor(t, dtype=kind, device=condition.device), 0.0)


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
