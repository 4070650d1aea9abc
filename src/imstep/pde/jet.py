"""A tensor that carries its derivatives with respect to few variables: value, first and combined second ones.

For inputs x(s) with s in R^k, an intermediate y keeps

    y,   ∂y/∂s_i  (k of them),   Σ_i c_ji ∂²y/∂s_i²  (one for each row c_j of a matrix)

A Laplacian needs one combination of second derivatives, whatever k is: the sums are propagated, not the summands
(the forward Laplacian of Li et al., arXiv 2307.08214; collapsed Taylor mode, Dangel et al., arXiv 2505.13644). All
three are ordinary tensors with autograd's graph to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., Any]

_RULES: dict[str, Rule] = {}
"""By the name of the function, for functions and methods alike."""

_LOOKS = {
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_sparse", "is_cuda", "is_complex"),
    *("dim", "size", "numel", "stride", "is_contiguous", "is_floating_point", "__len__", "element_size", "nelement"),
    *("ndimension", "get_device", "type", "is_nested", "is_quantized", "is_mkldnn", "is_meta", "is_conj", "is_neg"),
}
"""What asks for the form of a tensor only."""
_NOT_IN_PLACE = "Use functions that are not in place: torch.cat, torch.stack or torch.where."


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers what takes the place of the functions and methods of these names."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


class ExpansionError(ValueError):
    """A field does what would lose derivatives, or has none; the message says what to do."""


class Combination:
    """Which sums of second derivatives are kept: Σ_i c_ji ∂²/∂s_i² for the rows of c.

    Args:
        coefficients: c, (r, k).
    """

    def __init__(self, coefficients: Tensor) -> None:
        self._coefficients = coefficients
        self.rows, self.with_graph = len(coefficients), torch.is_grad_enabled()
        self._plain = self.rows == 1 and bool((coefficients == 1).all())

    def of(self, summands: Tensor) -> Tensor:
        """The sums of summands (k, ...), (r, ...)."""
        if self._plain:
            return summands.sum(0, keepdim=True)
        return torch.tensordot(self._coefficients.to(summands.dtype), summands, 1)


class Jet(Tensor):
    """A tensor with its derivatives; functions of PyTorch that are applied to it carry them along.

    Attributes:
        value: y, any shape.
        first: (k, *shape).
        second: (r, *shape); None where all vanish.
        combination: the sums that ``second`` holds.
    """

    value: Tensor
    first: Tensor
    second: Tensor | None
    combination: Combination

    @staticmethod
    def __new__(cls, value: Tensor, first: Tensor, second: Tensor | None, combination: Combination) -> Jet:
        if combination.with_graph and not torch.is_grad_enabled():
            raise ExpansionError(
                "the field that is expanded computes a part under no_grad or in a custom Function, where derivatives "
                "with respect to parameters would be lost. Call plain functions, or .detach() what is to be constant."
            )
        self = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        self.value, self.first, self.second, self.combination = value, first, second, combination
        return self

    def __init__(self, value: Tensor, first: Tensor, second: Tensor | None, combination: Combination) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Jet(value={self.value!r}, first={self.first!r}, second={self.second!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__
        if name in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "__setitem__" or "out" in kwargs:
            raise ExpansionError(f"a tensor that carries derivatives is written into another. {_NOT_IN_PLACE}")
        found = _RULES.get(name)
        if found is not None:
            return found(*args, **kwargs)
        if name.endswith("_") and not name.endswith("__"):
            return _in_place(name, func, args, kwargs)
        return _RULES["any"](func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise ExpansionError(
            f"{func} reached a tensor that carries derivatives out of sight of Python, as in compiled or scripted "
            "code; there is no rule for that. Call the plain function in the field that is expanded."
        )

    def become(self, other: Jet) -> Jet:
        """Take over what ``other`` holds, as after an in-place function."""
        if other.value.shape != self.value.shape:
            raise ExpansionError(f"an in-place function would change the shape of a {tuple(self.value.shape)} tensor.")
        self.value, self.first, self.second = other.value, other.first, other.second
        return self


def _in_place(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    plain, function = _RULES.get(name.rstrip("_")), getattr(Tensor, name.rstrip("_"), None)
    if not isinstance(args[0], Jet) or (plain is None and function is None):
        raise ExpansionError(f"{name} writes a tensor that carries derivatives over another. {_NOT_IN_PLACE}")
    return args[0].become(plain(*args, **kwargs) if plain else _RULES["any"](function, args, kwargs))


def chain(x: Jet, slopes: tuple[Tensor, Tensor, Tensor | None]) -> Jet:
    """y = f(x) entry by entry from f, f', f'' at x; None where f'' = 0."""
    y, slope, bend = slopes
    second = None if x.second is None else slope * x.second
    if bend is not None and x.combination.rows:
        bent = bend * x.combination.of(x.first.square())
        second = bent if second is None else second + bent
    return Jet(y, slope * x.first, second, x.combination)


def mapped(function: Callable[[Tensor], Any], x: Jet) -> Any:
    """A linear function of one jet, applied to the value and to each derivative."""
    value, first = function(x.value), torch.vmap(function)(resolved(x.first))
    second = None if x.second is None else torch.vmap(function)(resolved(x.second))
    if isinstance(value, Tensor):
        return Jet(value, first, second, x.combination)
    seconds = [None] * len(value) if second is None else second
    return rebuilt(value, [Jet(*parts, x.combination) for parts in zip(value, first, seconds, strict=True)])


def rebuilt(model: Any, parts: list[Any]) -> Any:
    """``parts`` as a sequence of the type of ``model``, which may be one of PyTorch's named tuples."""
    return list(parts) if isinstance(model, list) else type(model)(parts)


def resolved(t: Tensor) -> Tensor:
    """``t`` with conjugates and signs carried out that are put off: ``vmap`` and forward mode fail at some."""
    return t.resolve_conj().resolve_neg()


def value_of(t: Any) -> Any:
    return t.value if isinstance(t, Jet) else t


def broadcast(derivatives: Tensor, value: Tensor) -> Tensor:
    """Derivatives (k, *shape) so that they broadcast as a tensor of that shape does with ``value``."""
    short = value.dim() - (derivatives.dim() - 1)
    if short > 0:
        derivatives = derivatives.reshape(derivatives.shape[0], *([1] * short), *derivatives.shape[1:])
    return derivatives if derivatives.shape[1:] == value.shape else derivatives.expand(-1, *value.shape)


def shared(*tensors: Any) -> Combination:
    """The combination of the jets among ``tensors``."""
    found = {id(t.combination): t.combination for t in tensors if isinstance(t, Jet)}
    if len(found) > 1:
        raise ValueError("jets of different expansions meet; expand one function of all variables.")
    return next(iter(found.values()))
