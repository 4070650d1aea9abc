"""One direction of one layer of a plain recurrent network as one operator, forward and backward.

    h' = φ(p + W h),   φ = tanh or relu

Backward, with gh' the gradients that reach h' from outside:

    r = gh' + Wᵀ ga of the step after,    ga = φ' r,    gh = Wᵀ ga of the first step,    gW = Σ ga hᵀ

φ' follows from h'. As :mod:`imstep.complexstep.layers_of_steps` says, the formulas stand here twice. The gradient of W
is one product for all steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.gemm import multiply
from imstep.complexstep.layers_of_steps import LIBRARY, StepsFunction, before, steps_of

aten = torch.ops.aten

LIBRARY.define("rnn_layer(Tensor p, Tensor h, Tensor w, bool relu) -> Tensor")
LIBRARY.define("rnn_layer_backward(Tensor gh, Tensor hs, Tensor w, bool relu) -> Tensor")


def apply(p: Tensor, h: Tensor, w: Tensor, relu: bool) -> Tensor:
    """All h (time, batch, hidden) for projected inputs p of that shape and the first h."""
    hs: Tensor = Layer.apply(p, h, w, relu)
    return hs


# --- as operators ---------------------------------------------------------------------------------------------------


def layer(p: Tensor, h: Tensor, w: Tensor, relu: bool) -> Tensor:
    """All h (time, batch, hidden)."""
    steps = []
    for projected in p.unbind(0):
        a = projected + h @ w.t()
        h = torch.relu(a) if relu else torch.tanh(a)
        steps.append(h)
    return torch.stack(steps)


def layer_backward(gh: Tensor, hs: Tensor, w: Tensor, relu: bool) -> Tensor:
    """The gradients that reach p, from those of all h."""
    steps: list[Tensor] = []
    slopes = (hs > 0).to(hs.dtype) if relu else 1 - hs * hs
    for reached, slope in zip(reversed(gh.unbind(0)), reversed(slopes.unbind(0)), strict=True):
        steps.append((reached + steps[-1] @ w if steps else reached) * slope)
    return torch.stack(steps[::-1])


class Layer(StepsFunction):
    """The operator, which autograd differentiates."""

    WEIGHT, BIAS = 2, None

    @staticmethod
    def states(ctx: Any) -> Tensor:
        hs, h, _ = ctx.saved_tensors
        return before(h, hs)

    @staticmethod
    def forward(ctx: Any, p: Tensor, h: Tensor, w: Tensor, relu: bool) -> Tensor:
        hs: Tensor = torch.ops.imstep.rnn_layer(p, h, w, relu)
        ctx.save_for_backward(hs, h, w)
        ctx.relu = relu
        return hs

    @staticmethod
    def backward(ctx: Any, gh: Tensor) -> tuple[Tensor | None, ...]:
        hs, h, w = ctx.saved_tensors
        back = layer_backward if torch.is_grad_enabled() else torch.ops.imstep.rnn_layer_backward
        ga = back(gh, hs, w, ctx.relu)
        return ga, ga[0] @ w, multiply(ga.flatten(0, 1).t(), before(h, hs).flatten(0, 1)), None


# --- as kernels -----------------------------------------------------------------------------------------------------


def run(p: Tensor, h: Tensor, w: Tensor, relu: bool) -> Tensor:
    """As :func:`layer`."""
    hs, recurrent = torch.empty_like(p, memory_format=torch.contiguous_format), w.t()
    activate = torch.relu_ if relu else torch.tanh_
    for projected, h_ in steps_of(p, hs):
        torch.add(projected, multiply(h, recurrent), out=h_)
        h = activate(h_)
    return hs


def by_slope_(g: Tensor, h: Tensor, relu: bool) -> Tensor:
    """φ' g over g, φ' from the outputs h."""
    if relu:
        return aten.threshold_backward.grad_input(g, h, 0, grad_input=g)
    return aten.tanh_backward.grad_input(g, h, grad_input=g)


def go_back_(reached: Tensor, hs: Tensor, w: Tensor, relu: bool, more: Tensor | None = None) -> Tensor:
    """ga + ``more`` over gh, step by step; of ``reached`` and ``more`` a step may be a block, (k, batch, hidden)."""
    after: Tensor | None = None
    added = [None] * len(hs) if more is None else more.unbind(0)
    for g, h, extra in reversed(list(zip(reached.unbind(0), hs.unbind(0), added, strict=True))):
        if after is not None:
            g.add_(multiply(after.view(-1, after.shape[-1]), w).view_as(g))
        after = by_slope_(g, h.expand_as(g), relu)
        if extra is not None:
            after.add_(extra)
    return reached


def _backward(gh: Tensor, hs: Tensor, w: Tensor, relu: bool) -> Tensor:
    return go_back_(gh.clone(memory_format=torch.contiguous_format), hs, w, relu)


LIBRARY.impl("rnn_layer", run, "CompositeExplicitAutograd")
LIBRARY.impl("rnn_layer_backward", _backward, "CompositeExplicitAutograd")
