"""Shapes that many rules share: absent parts, finite arithmetic by a complex formula, sums of partial derivatives."""

from __future__ import annotations

import weakref

import torch

from imstep.complexstep.registry import Rule, exact, register, signature
from imstep.complexstep.rules.blocks import addcmul_, in_place


def plus(a, b):
    """a + b where either may be absent."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def times(d, factor):
    """d * factor where d may be absent."""
    return None if d is None else d * factor


def total(*terms):
    """The sum of the terms that are there; None if there is none."""
    result = None
    for term in terms:
        result = plus(result, term)
    return result


# --- accumulation in place: out of place where a block of directions stretches the result -----------------------


def add_(c, a):
    """c + a, in the memory of c."""
    return c.add_(a) if in_place(c, a) else c + a


def plus_times_(c, d, factor):
    """c + d * factor where either may be absent, in the memory of c."""
    if c is None or d is None:
        return times(d, factor) if c is None else c
    return addcmul_(c, d, factor) if d.shape == c.shape == factor.shape else c + d * factor


def dagger(a):
    """The conjugate transpose, made at once: below dispatch, where rules run, a lazy one (``.mH``) goes unnoticed."""
    return a.mT.conj_physical()


def evaluated(formula):
    """Finite arithmetic of an analytic formula: evaluated once on truly complex arguments.

    ``formula(*args, **kwargs)`` takes the operator's arguments; perturbed ones arrive as complex tensors.
    """

    def build(linearize):
        def finite(func, args, kwargs, ims, h):
            sig = signature(func)
            tensors = sig.gather(args, kwargs)
            if any(t is not None and t.is_complex() for t, d in zip(tensors, ims, strict=True) if d is not None):
                raise NotImplementedError(
                    "finite arithmetic on complex tensors; use h=None (infinitesimal arithmetic)."
                )
            arguments = [t if d is None else torch.complex(t, h * d) for t, d in zip(tensors, ims, strict=True)]
            numbers = [a if t is None else t for a, t in zip(_given(sig, args, kwargs), arguments, strict=True)]
            new_args, new_kwargs = sig.replace(args, kwargs, numbers)
            outputs = formula(*new_args, **new_kwargs)
            if isinstance(outputs, tuple):
                return tuple(_split(w, h)[0] for w in outputs), tuple(_split(w, h)[1] for w in outputs)
            return _split(outputs, h)

        return finite

    return build


def _given(sig, args, kwargs):
    return [args[at] if 0 <= at < len(args) else kwargs.get(name) for at, name, _, _ in sig.tensors]


def _split(w, h):
    return (w.real.clone(), w.imag / h) if w.is_complex() else (w, None)


WORKING: list[str] = []
"""Keys of the evaluations whose rules are at work, innermost last."""


def shared(name, x, compute):
    """``compute()``, a function of x alone, which another rule of this evaluation may have computed for its map."""
    if x.is_inference() or not WORKING:
        return compute()
    memory = x.untyped_storage().__dict__.setdefault("_imstep_functions", {})
    seen = WORKING[-1], x._version, x.dtype, x.shape, x.stride(), x.storage_offset()
    known, reference = memory.get(name, (None, None))
    value = reference() if known == seen else None
    if value is None:
        value = compute()
        memory[name] = seen, weakref.ref(value)
    return value


def zeros_of(t):
    """Zeros of the shape of ``t`` that take no memory and keep none alive."""
    return t.new_zeros(()).expand(t.shape)


def jointly_linear(*names, scalar=None):
    """Rule of an operator linear in the arguments ``names`` together, the others (indices, masks) being constant.

    ``scalar`` names a number among them, which has no imaginary part: 0 stands in its place.
    """

    def linearize(func, args, kwargs):
        sig = signature(func)
        tensors = sig.gather(args, kwargs)
        linear = [name in names for _, name, _, _ in sig.tensors]
        absent = [zeros_of(t) if yes and t is not None else t for t, yes in zip(tensors, linear, strict=True)]
        outputs = func(*args, **kwargs)
        args, kwargs = sig.replace(args, kwargs, absent)  # the closure below keeps no real part alive
        if scalar is not None:
            at = [a.name for a in func._schema.arguments].index(scalar)
            args = (*args[:at], 0, *args[at + 1 :])

        def push(*ims):
            parts = [a if d is None or not yes else d for a, d, yes in zip(absent, ims, linear, strict=True)]
            new_args, new_kwargs = sig.replace(args, kwargs, parts)
            return func(*new_args, **new_kwargs)

        return outputs, push

    return linearize


def register_linear(rule_of, *operators):
    """Register operators under a linearisation that is exact in finite arithmetic."""
    register(operators, Rule("linear", rule_of, exact(rule_of)))
