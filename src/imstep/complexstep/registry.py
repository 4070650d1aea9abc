"""The rules: what each PyTorch operator does to a complex-step number.

A rule maps the operator's real arguments to ``(outputs, push)``. ``push`` is the linear map from the imaginary
parts of the operator's tensor arguments, in the order of its schema and None where absent, to the imaginary
parts of its outputs. It is the operator's Frechet derivative at those arguments, so a tape of maps can be applied to
further directions without touching the real parts again.

In *infinitesimal* arithmetic that is the whole rule. In *finite* arithmetic, where h² terms are kept,
a rule that is linear once the real parts have made their choices serves unchanged (``exact``); products add
-h²·B(a', b'); elementwise functions are evaluated on a complex argument; everything else is decomposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from imstep.complexstep.errors import CONTROL, REPORT, UnsupportedOperatorError

Push = Callable[..., Any]
Linearize = Callable[..., tuple[Any, Push | None]]
Finite = Callable[..., tuple[Any, Any]]
Operator = OpOverload | OpOverloadPacket

_RUNNING_STATISTICS = ("running_mean", "running_var")  # overwritten by batch normalisation


@dataclass(frozen=True)
class Rule:
    """How one operator acts on complex-step numbers.

    Attributes:
        family: the group shown by ``explain()``: "linear", "multilinear", "elementwise", "piecewise", ...
        linearize: ``(func, args, kwargs) -> (outputs, push)``; ``push`` is None where the derivative vanishes.
        finite: ``(func, args, kwargs, ims, h) -> (outputs, imaginary outputs)``, or None: decompose.
    """

    family: str
    linearize: Linearize
    finite: Finite | None = None


_RULES: dict[Operator, Rule] = {}
_FOUND: dict[int, tuple[OpOverload, Rule | None]] = {}  # by identity: operators are slow to hash


def known(name: str) -> list[OpOverload]:
    """PyTorch's operator ``name``, where its version has it."""
    packet = getattr(torch.ops.aten, name, None)
    return [] if packet is None else [packet.default]


def register(operators: Iterable[Operator], rule: Rule) -> None:
    """Enter a rule for operators (an overload, or a packet for all of its overloads)."""
    for op in operators:
        if op in _RULES:
            raise ValueError(f"{op} has a rule already ({_RULES[op].family}); an operator has exactly one.")
        _RULES[op] = rule
    _FOUND.clear()


def lookup(op: OpOverload) -> Rule | None:
    """The rule of ``op``: its own, or that of its packet."""
    found = _FOUND.get(id(op))
    if found is None:
        found = _FOUND[id(op)] = op, _RULES.get(op) or _RULES.get(op.overloadpacket)
    return found[1]


@dataclass(frozen=True)
class Signature:
    """What the schema of an operator says of its tensor arguments.

    Attributes:
        tensors: (position, name, is a list, is written to) of each tensor argument; position -1: keyword only.
        mutates: whether an argument is overwritten.
        view: whether the output shares memory with an argument, by the schema.
        composite: whether it is defined by other operators, for autograd as well.
        functional: the operator that computes the same without overwriting, if there is one.
        operator: the operator.
    """

    tensors: tuple[tuple[int, str, bool, bool], ...]
    mutates: bool
    view: bool
    composite: bool
    functional: OpOverload | None
    operator: OpOverload

    @cached_property
    def window(self) -> bool:
        """Whether it takes one tensor and does nothing but look at it in another way."""
        return self.view and not self.composite and [(at, many) for at, _, many, _ in self.tensors] == [(0, False)]

    @cached_property
    def collective(self) -> bool:
        """Whether it exchanges tensors with other processes."""
        return "c10d" in self.operator.namespace

    @cached_property
    def overwritten(self) -> tuple[int, ...]:
        """Which tensor arguments it may overwrite, running statistics, unknown to the schema, among them."""
        return tuple(
            i for i, (_, name, _, written) in enumerate(self.tensors) if written or name in _RUNNING_STATISTICS
        )

    def count_writes(self, tensors: Sequence[Any]) -> None:
        """Count the writes to lists of tensors in their versions, which PyTorch leaves out under a dispatch mode.

        By them autograd tells that a view has a new history, and that what it has saved was overwritten.
        """
        for t, (*_, written) in zip(tensors, self.tensors, strict=True):
            if written and isinstance(t, (list, tuple)):
                torch.autograd.graph.increment_version([u for u in t if not u.is_inference()])

    def gather(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The tensor arguments (a tensor, a list, or None also for a number) in the order of the schema."""
        count, found = len(args), []
        for at, name, _, _ in self.tensors:
            t = args[at] if 0 <= at < count else kwargs.get(name)
            found.append(t if isinstance(t, (Tensor, list, tuple)) else None)
        return found

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Iterable[Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the tensor arguments exchanged for ``tensors``."""
        new_args, new_kwargs = list(args), dict(kwargs)
        for (at, name, _, _), value in zip(self.tensors, tensors, strict=True):
            if 0 <= at < len(new_args):
                new_args[at] = value
            elif name in new_kwargs:
                new_kwargs[name] = value
        return tuple(new_args), new_kwargs


FRESH = torch.ops.aten.lift_fresh.default
"""What ``torch.tensor(...)`` shows its new memory by."""

_SIGNATURES: dict[int, Signature] = {}  # by identity: operators are slow to hash


def signature(op: OpOverload) -> Signature:
    """The signature of ``op``, computed once."""
    found = _SIGNATURES.get(id(op))
    if found is None:
        found = _SIGNATURES[id(op)] = _signature(op)
    return found


def _signature(op: OpOverload) -> Signature:
    if isinstance(op, HigherOrderOperator):
        raise UnsupportedOperatorError(op, "it takes functions, which run out of sight of the arithmetic.", CONTROL)
    tensors = []
    for at, argument in enumerate(op._schema.arguments):
        kind = str(argument.type)
        if "Tensor" in kind:
            written = argument.alias_info is not None and argument.alias_info.is_write
            position = -1 if argument.kwarg_only else at
            tensors.append((position, argument.name, kind.startswith("List"), written))
    mutates = any(written for *_, written in tensors)
    view = not mutates and any(r.alias_info is not None for r in op._schema.returns)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    return Signature(tuple(tensors), mutates, view, composite, _functional(op) if mutates else None, op)


def any_complex(tensors: Iterable[Any]) -> bool:
    """Whether one of nested tensors is complex."""
    for t in tensors:
        if isinstance(t, Tensor):
            if t.is_complex():
                return True
        elif t is not None and any_complex(t):
            return True
    return False


def conjugating(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function of complex tensors within the handler of a mode.

    PyTorch leaves the fallbacks of lazy conjugates out there, and kernels that conjugate lazily, such as pinv's, then
    compute wrong values.
    """
    with torch._C._PreserveDispatchKeyGuard():
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.Conjugate, False)
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.Negative, False)
        return func(*args, **kwargs)


def _functional(op: OpOverload) -> OpOverload | None:
    name = op.overloadpacket.__name__
    home = getattr(torch.ops, op.namespace)
    packets = [op.overloadpacket]
    if name.endswith("_") and not name.endswith("__"):
        names = (name[:-1], f"{name}functional")
        packets = [getattr(home, n) for n in names if hasattr(home, n)] + packets
    # An out= argument is no input. Arguments correspond, names of overloads do not: pow_.Scalar is pow.Tensor_Scalar.
    taken = [(a.name, str(a.type)) for a in op._schema.arguments if not _is_output(a)]
    for packet in packets:
        for overload in packet.overloads():
            candidate = getattr(packet, overload)
            if any(a.alias_info is not None and a.alias_info.is_write for a in candidate._schema.arguments):
                continue
            if [(a.name, str(a.type)) for a in candidate._schema.arguments] == taken:
                return candidate
    return None


def _is_output(argument: Any) -> bool:
    return argument.kwarg_only and argument.alias_info is not None and argument.alias_info.is_write


_DEFINITIONS: dict[OpOverload, Callable[..., Any]] = {}


def defined_as(*operators: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function that computes operators by simpler ones, where PyTorch has no decomposition."""

    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        for op in operators:
            _DEFINITIONS[op] = f
        return f

    return decorate


def definition(op: OpOverload) -> Callable[..., Any] | None:
    """The function entered for ``op`` by :func:`defined_as`, or None."""
    return _DEFINITIONS.get(op)


# --- the families -----------------------------------------------------------------------------------------------


def constant(*operators: Operator) -> None:
    """Operators whose derivative is zero (or zero almost everywhere): the imaginary part ends there."""
    linearize = lambda func, args, kwargs: (func(*args, **kwargs), None)
    finite = lambda func, args, kwargs, ims, h: (func(*args, **kwargs), None)
    register(operators, Rule("constant", linearize, finite))


def linear(*operators: Operator) -> None:
    """Operators linear in their first tensor argument, the others (indices, masks) being constant."""

    def linearize(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Push]:
        rest = args[1:]

        def push(dx: Tensor, *others: Any) -> Any:
            if dx is None or any(o is not None for o in others if not isinstance(o, list)):
                raise UnsupportedOperatorError(
                    func, "a perturbed tensor stands where this rule expects a constant.", REPORT
                )
            return func(dx, *rest, **kwargs)

        return func(*args, **kwargs), push

    register(operators, Rule("linear", linearize, exact(linearize)))


def multilinear(*operators: Operator, factors: tuple[int, ...] = (0, 1)) -> None:
    """Operators linear in each of two tensor arguments, ``factors``: d(ab) = a'b + ab'."""

    def linearize(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Push]:
        def push(*ims: Any) -> Tensor | None:
            total = None
            for i in factors:
                if ims[i] is not None:
                    term = func(*args[:i], ims[i], *args[i + 1 :], **kwargs)
                    total = term if total is None else total + term
            return total

        return func(*args, **kwargs), push

    register(operators, Rule("multilinear", linearize, bilinear(linearize, factors)))


def elementwise(
    op: Operator,
    derivative: Callable[..., Tensor | float],
    on_complex: Callable[..., Tensor] | None = None,
    kernel: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """A function of one tensor, entry by entry: ``derivative(x, y, *rest)`` is f'(x), y = f(x).

    ``on_complex`` is the function for complex arguments; PyTorch's own operator where None. ``kernel(dx, y)`` is
    f'(x) dx for a real y, where that takes no slope to be kept.
    """

    def finite(
        func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], ims: list[Any], h: float
    ) -> tuple[Tensor, Tensor]:
        x = args[0]
        w = (on_complex or func)(torch.complex(x, h * ims[0]), *args[1:], **kwargs)
        # Outside its domain the real function is not a number, however well the complex one is defined there.
        outside = torch.isnan(func(*args, **kwargs))
        return torch.where(outside, torch.nan, w.real), w.imag / h

    register([op], Rule("elementwise", _slope(derivative, kernel), finite))


def real_elementwise(op: Operator, derivative: Callable[..., Tensor | float]) -> None:
    """As :func:`elementwise`, for a function that PyTorch evaluates on real arguments only."""
    register([op], Rule("elementwise", _slope(derivative)))


def _slope(
    derivative: Callable[..., Tensor | float], kernel: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Linearize:
    def linearize(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Push]:
        y = func(*args, **kwargs)
        if kernel is not None and not y.is_complex():
            return y, lambda dx, *_: kernel(dx, y)
        slope = derivative(args[0], y, *args[1:], **kwargs)
        return y, lambda dx, *_: dx * slope

    return linearize


def rule(*operators: Operator, family: str, finite: Callable[[Linearize], Finite] | None = None) -> Callable[..., Any]:
    """Register a hand-written rule ``f(*args, **kwargs) -> (outputs, push)``.

    ``finite=exact`` where the operator is linear once the real parts have chosen (relu, max, pooling).
    """

    def decorate(f: Callable[..., tuple[Any, Push | None]]) -> Callable[..., tuple[Any, Push | None]]:
        linearize = lambda func, args, kwargs: f(*args, **kwargs)
        register(operators, Rule(family, linearize, finite(linearize) if finite else None))
        return f

    return decorate


# --- finite arithmetic from a linear map ------------------------------------------------------------------------


def exact(linearize: Linearize) -> Finite:
    """Finite arithmetic of an operator without h² terms: the same linear map."""

    def finite(func: Any, args: Any, kwargs: Any, ims: list[Any], h: float) -> tuple[Any, Any]:
        outputs, push = linearize(func, args, kwargs)
        return outputs, None if push is None else push(*ims)

    return finite


def bilinear(linearize: Linearize, factors: tuple[int, ...]) -> Finite:
    """Finite arithmetic of a product: re = ab - h² a'b', im = a'b + ab'."""

    def finite(func: Any, args: Any, kwargs: Any, ims: list[Any], h: float) -> tuple[Any, Any]:
        outputs, push = linearize(func, args, kwargs)
        assert push is not None
        i, j = factors
        if ims[i] is not None and ims[j] is not None and h * h != 0.0:
            both = list(args)
            both[i], both[j] = ims[i], ims[j]
            outputs = outputs - h * h * func(*both, **kwargs)
        return outputs, push(*ims)

    return finite
