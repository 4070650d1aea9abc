"""Derivatives of functions: ``derivative``, ``jvp`` and ``hvp``, on tensors or pytrees of tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from imstep.complexstep.arithmetic import Arithmetic
from imstep.complexstep.generators import Generators
from imstep.complexstep.islands import plain, unseen
from imstep.complexstep.nesting import is_nested, refuse_lost_graph, refuse_transforms
from imstep.complexstep.sight import Threads, refuse_threads, traced
from imstep.uncompiled import uncompiled

DEFAULT_H = 1e-20

_Tree = TypeVar("_Tree")
_Value = TypeVar("_Value")
_Float = TypeVar("_Float", bound="np.floating[Any]")


@overload
def derivative(f: Callable[[Tensor], Tensor], x: Tensor, h: float | None = None) -> Tensor: ...


@overload
def derivative(f: Callable[[Any], Any], x: NDArray[_Float], h: float | None = None) -> NDArray[_Float]: ...


@overload
def derivative(f: Callable[[Any], Any], x: float, h: float | None = None) -> float: ...


@uncompiled
def derivative(f: Callable[[Any], Any], x: Any, h: float | None = None) -> Any:
    """The derivative of a function that acts on each entry by itself.

        f'(x) = Im f(x + ih) / h

    Args:
        f: maps a tensor (or NumPy array, or float) to one of the same shape, entry by entry.
        x: where; a real floating-point tensor, a NumPy array or a float.
        h: None for complex-step numbers, which need no complex support of ``f`` (tensors only); or a step, then
            ``f`` is called with a truly complex argument. NumPy arrays and floats always take this
            way, with h = 1e-20 by default.

    Returns:
        f'(x), of the shape and dtype of ``x``; exact to rounding for every h small enough that h² is negligible.

    Raises:
        TypeError: ``x`` is not real floating point.

    Source: Squire and Trapp, SIAM Review 40 (1998), 110-112, equation (2).

    Example:
        >>> round(derivative(lambda z: z**3, 2.0), 12)
        12.0
        >>> derivative(torch.sin, torch.zeros(2))
        tensor([1., 1.])
    """
    if isinstance(x, Tensor):
        _require_real(x, "x")
        refuse_transforms("derivative", [x], alone=False)
        if h is None:
            return _jvp_flat(lambda leaves: f(leaves[0]), [x], [torch.ones_like(x)])[1]
        return f(torch.complex(x, torch.full_like(x, h))).imag / h
    h = DEFAULT_H if h is None else h
    if isinstance(x, np.ndarray) and x.dtype.kind != "f":
        raise TypeError(
            f"x is an array of dtype {x.dtype}; the complex step needs real floating point. Use x.astype(float)."
        )
    return np.imag(f(x + 1j * h)) / h


@uncompiled
def jvp(f: Callable[..., _Value], primals: Any, tangents: Any) -> tuple[_Value, _Value]:
    """The value and the directional derivative of a function, from one evaluation of it.

        (f(x), J(x) v),   J v = Im f(x + ihv) / h

    Args:
        f: called as ``f(*primals)``; returns a tensor or a pytree of tensors.
        primals: tuple of tensors or pytrees of floating-point tensors, real or complex.
        tangents: directions, of the structure, shapes and dtypes of ``primals``.

    Returns:
        ``(value, J v)`` in the structure of what ``f`` returns, as :func:`torch.func.jvp` does.

    Raises:
        ValueError: structures or shapes of ``primals`` and ``tangents`` differ.
        ComplexStepError: it is called on what a transform of ``torch.func`` hides.

    Cost: about two evaluations of ``f``.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> jvp(lambda t: t * t, (x,), (torch.ones(2),))
        (tensor([1., 4.]), tensor([2., 4.]))
    """
    primals, tangents = (p if isinstance(p, tuple) else (p,) for p in (primals, tangents))
    leaves, structure = tree_flatten(primals)
    directions = _match(tangents, leaves, structure, "tangents", "primals")
    refuse_transforms("jvp", [*leaves, *directions], alone=False)
    return _jvp_flat(lambda inputs: f(*tree_unflatten(inputs, structure)), leaves, directions)


@uncompiled
def hvp(f: Callable[[_Tree], Tensor], x: _Tree, v: _Tree, h: float | None = None) -> _Tree:
    """A Hessian-vector product, from one forward and one backward pass of ``f``.

        H(x) v = Im ∇f(x + ihv) / h

    Args:
        f: maps ``x`` to a scalar tensor (one entry).
        x: a tensor or a pytree of floating-point tensors, of any shapes. A complex one is differentiated as a pair of
            real ones, and gradients are written as autograd does, ∂f/∂a + i ∂f/∂b for x = a + bi.
        v: the direction, of the structure and shapes of ``x``.
        h: None for infinitesimal arithmetic (h² dropped, nothing to choose), or the step of finite
            arithmetic, h > 0; rounding-exact for 1e-8 >= h >= 1e-300 in float64.

    Returns:
        H v in the structure, shapes and dtypes of ``x``.

    Raises:
        ValueError: ``f`` returns no scalar, or structures differ.
        UnsupportedOperatorError: ``f`` uses an operator without a rule.
        ComplexStepError: it is called within a transform of ``torch.func``.

    Cost: two to three gradients. No ``create_graph``, no second graph.

    Source: the complex step on a gradient; equal to the R-operator of Pearlmutter, Neural Computation 6 (1994),
        147-160, section 3, when h² is dropped.

    Example:
        >>> hvp(lambda t: (t ** 3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    leaves, structure = tree_flatten(x)
    directions = _match(v, leaves, structure, "v", "x")
    refuse_transforms("hvp", [*leaves, *directions], alone=True)
    evaluate = lambda sign: _product(lambda inputs: f(tree_unflatten(inputs, structure)), leaves, directions, h, sign)
    found: _Tree = tree_unflatten(_over_branches(evaluate, leaves), structure)
    return found


def _product(
    f: Callable[[list[Tensor]], Any], leaves: list[Tensor], directions: list[Tensor], h: float | None, sign: int
) -> tuple[list[Tensor], bool]:
    """A Hessian product, and whether there are two branches: see :meth:`Arithmetic.take_branch`."""
    arithmetic = Arithmetic(h)
    arithmetic.take_branch(sign)
    # In inference mode there would be no graph, and each product zero.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        inputs = [_leaf(t).requires_grad_() for t in leaves]
        for t, d in zip(inputs, directions, strict=True):
            arithmetic.attach(t, d)
        started = torch.autograd._get_sequence_nr()
        with arithmetic, torch.enable_grad():
            loss = f(inputs)
            loss = plain(loss) if isinstance(loss, Tensor) else loss
            _require_scalar(loss)
            refuse_threads([loss], inputs, started, arithmetic.passes)
            parts = arithmetic.product(loss, inputs)
    refuse_lost_graph("hvp", [loss, *leaves, *directions], inputs)
    products = [torch.zeros_like(t) if part is None else part for t, part in zip(leaves, parts, strict=True)]
    return [_without_graph(p) for p in products], arithmetic.branched


def _over_branches(evaluate: Callable[[int], tuple[Any, bool]], leaves: list[Tensor]) -> Any:
    """What an evaluation finds; the mean over its branches, if there are two."""
    if not is_nested():
        return evaluate(1)[0]
    random = Generators(t.device for t in leaves)
    found, branched = evaluate(1)
    if not branched:
        return found
    random.restore()
    mean = lambda a, b: (a + b) / 2 if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) else a
    return tree_map(mean, found, evaluate(-1)[0])


@uncompiled
def third_derivative(f: Callable[[_Tree], Tensor], x: _Tree, v: _Tree, w: _Tree | None = None) -> _Tree:
    """The third derivative along two directions, from one forward and one backward pass on numbers nested once more.

        D³f(x)[v, w, ·] = Im_2 Im_1 ∇f(x + ih₁v + ih₂w) / (h₁h₂)

    Its inner product with a third direction u is D³f(x)[v, w, u].

    Args:
        f: maps ``x`` to a scalar tensor (one entry).
        x: a tensor or a pytree of floating-point tensors, of any shapes; complex ones as for :func:`hvp`.
        v, w: directions, of the structure and shapes of ``x``; w = v if it is left out.

    Returns:
        D³f(x)[v, w, ·] in the structure, shapes and dtypes of ``x``.

    Raises:
        ValueError: ``f`` returns no scalar, or structures differ.
        UnsupportedOperatorError: ``f`` uses an operator without a rule, or the rule of one does.

    Cost: 25/3 gradients in matrix products: of two parts each a product makes 3, of four parts 8 or 9.

    Source: the complex step on a Hessian product, which is one itself; multicomplex numbers, Lantoine, Russell and
        Dargent, ACM Transactions on Mathematical Software 38 (2012), article 16, with h₁² and h₂² dropped.

    Example:
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
        >>> third_derivative(lambda t: (t ** 4).sum(), x, v)      # 24 x v²
        tensor([ 24., 432.])
    """
    return jvp(lambda at: hvp(f, at, v), (x,), (v if w is None else w,))[1]


def _jvp_flat(f: Callable[[list[Tensor]], Any], leaves: list[Tensor], directions: list[Tensor]) -> tuple[Any, Any]:
    found: tuple[Any, Any] = _over_branches(lambda sign: _pushed(f, leaves, directions, sign), leaves)
    return found


def _pushed(
    f: Callable[[list[Tensor]], Any], leaves: list[Tensor], directions: list[Tensor], sign: int
) -> tuple[tuple[Any, Any], bool]:
    """The value and the directional derivative, and whether there are two branches."""
    with Threads() as threads:
        outputs, arithmetic = _evaluate(f, leaves, directions, sign, threads.before)
    if threads.begun and not threads.before:
        outputs, arithmetic = _evaluate(f, leaves, directions, sign, True)
    found = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    refuse_lost_graph("jvp", [*found, *leaves, *directions])
    value = lambda t: _without_graph(t) if isinstance(t, Tensor) else t
    part = lambda t: _without_graph(arithmetic.value(t).imaginary) if isinstance(t, Tensor) else t
    return (tree_map(value, outputs), tree_map(part, outputs)), arithmetic.branched


def _evaluate(
    f: Callable[[list[Tensor]], Any], leaves: list[Tensor], directions: list[Tensor], sign: int, several: bool
) -> tuple[Any, Arithmetic]:
    """What ``f`` returns on complex-step numbers; checked by a graph if there are ``several`` threads."""
    inputs, started = [_leaf(t) for t in leaves], torch.autograd._get_sequence_nr()
    several = several and torch._C._functorch.maybe_current_level() is None
    arithmetic = Arithmetic()
    arithmetic.take_branch(sign)
    for t, d in zip(inputs, directions, strict=True):
        arithmetic.attach(traced(t) if several else t, d)
    with arithmetic, torch.enable_grad() if several else nullcontext():
        outputs = f([t.clone() for t in inputs] if several else inputs)
        found = [plain(t) for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        if several:
            refuse_threads(found, inputs, started, arithmetic.passes)
        arithmetic.settle(found)
    return outputs, arithmetic


def _leaf(t: Any) -> Tensor:
    if not isinstance(t, Tensor) or not t.is_complex():
        _require_real(t, "each leaf of x")
    return _without_graph(t).clone()


def _without_graph(t: Tensor) -> Tensor:
    """``t`` for autograd a constant; within another arithmetic still what it is there."""
    with unseen():
        return plain(t).detach()


def _require_real(t: Any, name: str) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        kind = f"a tensor of {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(
            f"{name} is {kind}; the complex step needs real floating-point tensors. "
            "Convert it with .float() or .double()."
        )


def _require_scalar(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"f returned {got}; a Hessian product needs a scalar. Reduce it, for instance with .sum() or .mean()."
        )


def _match(tree: Any, leaves: list[Tensor], structure: Any, name: str, other: str) -> list[Tensor]:
    found, found_structure = tree_flatten(tree)
    if found_structure != structure:
        raise ValueError(f"{name} has the structure {found_structure}, {other} has {structure}; they must agree.")
    for d, t in zip(found, leaves, strict=True):
        if not isinstance(t, Tensor) or not isinstance(d, Tensor):
            wrong, what = (name, d) if isinstance(t, Tensor) else (other, t)
            raise TypeError(
                f"a leaf of {wrong} is of type {type(what).__name__}; leaves are tensors. Convert arrays and numbers "
                "with torch.as_tensor, and give constants to the function itself, as by a lambda."
            )
        if d.shape != t.shape:
            got = tuple(d.shape)
            raise ValueError(f"a leaf of {name} has shape {got} where {other} has {tuple(t.shape)}; they must agree.")
        if d.is_complex() and not t.is_complex():
            raise TypeError(
                f"a leaf of {name} is complex where {other} is real. Pass a real direction, such as its real part."
            )
    return found
