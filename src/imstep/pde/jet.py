"""A tensor that carries its derivatives with respect to few variables: value, first and combined second ones.

For inputs x(s) with s in R^k, an intermediate y keeps

    y,   ∂y/∂s_i  (k of them),   Σ_i c_ji ∂²y/∂s_i²  (one for each row c_j of a matrix)

A Laplacian needs one combination of second derivatives, whatever k is: the sums are propagated, not the summands
(the forward Laplacian of Li et al., arXiv 2307.08214; collapsed Taylor mode, Dangel et al., arXiv 2505.13644). All
three are ordinary tensors with autograd's graph to the parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Rule = Callable[..., Any]

_RULES: dict[str, Rule] = {}
"""By the name of the function, for functions and methods alike."""
_FRESH: set[str] = set()
"""Those that never return views."""

_LOOKS = {
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_sparse", "is_cuda", "is_complex"),
    *("dim", "size", "numel", "is_floating_point", "__len__", "element_size", "nelement"),
    *("ndimension", "get_device", "is_nested", "is_quantized", "is_mkldnn", "is_meta"),
}
"""What asks for the form of a tensor only."""
_LAYOUT = {"stride", "storage_offset", "is_contiguous", "is_conj", "is_neg"}
"""What asks how the value of a tensor lies in memory."""
NOT_IN_PLACE = "Use functions that are not in place: torch.cat, torch.stack or torch.where."


def rule(*names: str, fresh: bool = False) -> Callable[[Rule], Rule]:
    """Registers what takes the place of the functions and methods of these names; ``fresh`` results are no views."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        _FRESH.update(names if fresh else ())
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
        look: what a view shows of its base, as a function of plain tensors of that one's shape.
    """

    combination: Combination
    look: Callable[[Tensor], Tensor]
    _parts: tuple[Tensor, Tensor, Tensor | None]
    _origin: Jet | None
    _changes: int
    _lent: list[weakref.ref[Tensor]]

    @staticmethod
    def __new__(cls, value: Tensor, first: Tensor, second: Tensor | None, combination: Combination) -> Jet:
        if combination.with_graph and not torch.is_grad_enabled():
            raise ExpansionError(
                "the field that is expanded computes a part under no_grad or in a custom Function, where derivatives "
                "with respect to parameters would be lost. Call plain functions, or .detach() what is to be constant."
            )
        self = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        self._parts, self.combination = (value, first, second), combination
        self._origin, self.look, self._changes, self._lent = None, _whole, 0, []
        return self

    def __init__(self, value: Tensor, first: Tensor, second: Tensor | None, combination: Combination) -> None:
        super().__init__()

    def _now(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The three parts; a view's are read anew where its base has changed."""
        base = self._origin
        if base is not None and self._changes != base._changes:
            self._parts, self._changes = mapped(self.look, base)._parts, base._changes
        return self._parts

    @property
    def base(self) -> Jet:
        """The jet whose memory this one shows a part of, as views do; itself where it has its own."""
        return self if self._origin is None else self._origin

    @property
    def value(self) -> Tensor:
        return self._now()[0]

    @property
    def first(self) -> Tensor:
        return self._now()[1]

    @property
    def second(self) -> Tensor | None:
        return self._now()[2]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Jet(value={self.value!r}, first={self.first!r}, second={self.second!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", type(func).__name__)
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__
        if name in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _LAYOUT:
            return func(args[0].value, *args[1:], **kwargs)
        if kwargs.get("out") is not None:
            raise ExpansionError(f"a tensor that carries derivatives is written into another. {NOT_IN_PLACE}")
        in_place = kwargs.pop("inplace", False)
        if in_place or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            return _RULES["in place"](name, func, args, kwargs)
        found = _RULES.get(name)
        result = found(*args, **kwargs) if found else _RULES["any"](func, args, kwargs)
        if name not in _FRESH:
            _link(result, func, args, kwargs)
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise ExpansionError(
            f"{func} reached a tensor that carries derivatives out of sight of Python, as in compiled or scripted "
            "code, or under transforms of torch.func; there is no rule for that. Call the plain function in the field "
            "that is expanded, and imstep.pde for derivatives within it."
        )

    def overwrite(self, value: Tensor, first: Tensor, second: Tensor | None) -> None:
        """Hold these parts from now on, as all views of this jet, which has memory of its own, will show."""
        if any(plain() is not None for plain in self._lent):
            raise ExpansionError(
                "a tensor that carries derivatives is changed in place while one that was detached from it, and shares "
                "its memory, is still there. Take .detach().clone(), or a function that is not in place."
            )
        self._parts, self._changes = (value, first, second), self._changes + 1

    def lend(self, plain: Tensor) -> None:
        """``plain`` shows memory of this jet, and cannot follow its changes."""
        self._lent.append(weakref.ref(plain))

    def show(self, base: Jet, look: Callable[[Tensor], Tensor]) -> None:
        """Be a view of ``base`` from now on."""
        self._origin, self.look, self._changes = base, look, base._changes


def _whole(t: Tensor) -> Tensor:
    return t


def _link(result: Any, func: Any, args: Any, kwargs: Any) -> None:
    """Tells results of a function that are views of one of its arguments of what they show."""
    given = [*args, *kwargs.values()]
    given += [t for several in given if isinstance(several, (list, tuple)) for t in several]
    bases = {_memory(t): t.base for t in given if isinstance(t, Jet)}
    for n, part in enumerate(result if isinstance(result, (list, tuple)) else [result]):
        base = bases.get(_memory(part)) if isinstance(part, Tensor) and all(part is not t for t in given) else None
        if base is not None and isinstance(part, Jet):
            part.show(base, _look(func, args, kwargs, base, n))
        elif base is not None:
            base.lend(part)


def _look(func: Any, args: Any, kwargs: Any, base: Jet, n: int) -> Callable[[Tensor], Tensor]:
    """What the n-th result of a function shows of ``base``."""

    def look(t: Tensor) -> Any:
        filled = lambda a: (a.look(t) if a.base is base else a.value) if isinstance(a, Jet) else a
        given, named = tree_map(filled, (args, kwargs), is_leaf=lambda a: isinstance(a, Jet))
        shown = func(*given, **named)
        return shown[n] if isinstance(shown, (list, tuple)) else shown

    return look


def _memory(t: Tensor) -> int:
    """Which memory a tensor lies in."""
    while isinstance(t, Jet) or torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = t.value if isinstance(t, Jet) else torch._C._functorch.get_unwrapped(t)
    return t.untyped_storage()._cdata


def chain(x: Jet, slopes: tuple[Tensor, Tensor, Tensor | None]) -> Jet:
    """y = f(x) entry by entry from f, f', f'' at x; None where f'' = 0."""
    y, slope, bend = slopes
    second = None if x.second is None else slope * x.second
    if bend is not None and x.combination.rows:
        bent = bend * x.combination.of(x.first.square())
        second = bent if second is None else second + bent
    return Jet(y, slope * x.first, second, x.combination)


def mapped(function: Callable[[Tensor], Any], x: Jet) -> Any:
    """A linear function of one jet, applied to the value and to each derivative; what is of integers has none."""
    value = function(x.value)
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return value
    first = _each(function, resolved(x.first))
    second = None if x.second is None else _each(function, resolved(x.second))
    if isinstance(value, Tensor):
        return Jet(value, first, second, x.combination)
    seconds = [None] * len(value) if second is None else second
    return rebuilt(value, [Jet(*parts, x.combination) for parts in zip(value, first, seconds, strict=True)])


def _each(function: Callable[[Tensor], Any], derivatives: Tensor) -> Any:
    """A linear function of each entry of the first axis, also of one that carries derivatives of another expansion."""
    all_of = torch.vmap(function)
    return mapped(all_of, derivatives) if isinstance(derivatives, Jet) else all_of(derivatives)


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
        raise ExpansionError(
            "a field within a field uses points of both. Let the inner field depend on its own points only, and "
            "multiply its derivatives by the rest afterwards; or expand one function of all variables."
        )
    return next(iter(found.values()))
