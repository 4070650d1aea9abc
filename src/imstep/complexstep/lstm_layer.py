"""One direction of one layer of an LSTM as one operator, forward and backward.

    i, f, g, o = a = (sigmoid, sigmoid, tanh, sigmoid)(p + W h)
    c' = f c + i g,    t = tanh c',    h' = o t

Backward, with gh' and gc' the gradients that reach h' and c' from outside and from the step after:

    u = gc' + gh' b,    ggates = (u, u, u, gh') m,    gc = u f,    gh = Wᵀ ggates
    b = o (1 - t²),    m = (g, c, i, t) (i (1 - i), f (1 - f), 1 - g², o (1 - o))

The formulas stand here twice, as :mod:`imstep.complexstep.layers_of_steps` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.gemm import multiply
from imstep.complexstep.layers_of_steps import LIBRARY, StepsFunction, before, steps_of

aten = torch.ops.aten

LIBRARY.define("lstm_layer(Tensor p, Tensor h, Tensor c, Tensor w) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    "lstm_layer_backward(Tensor gh, Tensor gc, Tensor a, Tensor cs, Tensor c, Tensor w, Tensor m, Tensor t) "
    "-> (Tensor, Tensor)"
)


def apply(p: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """All h and all c (time, batch, hidden) for projected inputs p (time, batch, 4 hidden) and the first state."""
    hs, cs, *_ = Layer.apply(p, h, c, w)
    return hs, cs


def gates_of(t: Tensor) -> tuple[Tensor, ...]:
    """The parts of a tensor (..., 4 hidden) that belong to i, f, g and o."""
    return t.chunk(4, -1)


def by_factor(t: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of a tensor (..., 4 hidden) where a gradient has the factor u, (..., 3, hidden), and gh'."""
    u, h = t.unflatten(-1, (4, -1)).split((3, 1), -2)
    return u, h.squeeze(-2)


# --- as operators ---------------------------------------------------------------------------------------------------


def layer(p: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """All h, c, a, m and t (time, batch, ...)."""
    started, steps = c, []
    for projected in p.unbind(0):
        i, f, g, o = gates_of(projected + h @ w.t())
        a = torch.cat([torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)], 1)
        i, f, g, o = gates_of(a)
        c = f * c + i * g
        h = o * torch.tanh(c)
        steps.append((h, c, a))
    hs, cs, activations = (torch.stack(s) for s in zip(*steps, strict=True))
    t = torch.tanh(cs)
    return hs, cs, activations, _factors(activations, cs, started, t), t


def _factors(a: Tensor, cs: Tensor, c: Tensor, t: Tensor) -> Tensor:
    """m."""
    i, f, g, o = gates_of(a)
    slope = torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
    return torch.cat([g, before(c, cs), i, t], -1) * slope


def layer_backward(
    gh: Tensor, gc: Tensor, a: Tensor, cs: Tensor, c: Tensor, w: Tensor, *_: Tensor, ga: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients that reach the gates (time, batch, 4 hidden) and the first c, from those of all h, c and a."""
    t = torch.tanh(cs)
    i, f, g, o = gates_of(a)
    m, b = _factors(a, cs, c, t), o * (1 - t * t)
    direct = None if ga is None else ga * torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
    steps: list[Tensor] = []
    carried = torch.zeros_like(c)
    for at in reversed(range(len(cs))):
        reached = gh[at] + steps[-1] @ w if steps else gh[at]
        u = gc[at] + carried + reached * b[at]
        gates = torch.cat([u, u, u, reached], 1) * m[at]
        steps.append(gates if direct is None else gates + direct[at])
        carried = u * f[at]
    return torch.stack(steps[::-1]), carried


class Layer(StepsFunction):
    """The operator, which autograd differentiates."""

    WEIGHT, BIAS = 3, None

    @staticmethod
    def states(ctx: Any) -> Tensor:
        hs, _, _, h, *_ = ctx.saved_tensors
        return before(h, hs)

    @staticmethod
    def forward(ctx: Any, p: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        hs, cs, a, m, t = torch.ops.imstep.lstm_layer(p, h, c, w)
        ctx.save_for_backward(hs, cs, a, h, c, w, m, t)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(m, t)
        return hs, cs, a, m, t

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, ...]:
        gh, gc, ga, *_ = gradients
        hs, cs, a, h, c, w, m, t = ctx.saved_tensors
        gh = torch.zeros_like(cs) if gh is None else gh
        gc = torch.zeros_like(cs) if gc is None else gc
        if torch.is_grad_enabled() or ga is not None:
            gates, first = layer_backward(gh, gc, a, cs, c, w, ga=ga)
        else:
            gates, first = torch.ops.imstep.lstm_layer_backward(gh, gc, a, cs, c, w, m, t)
        return gates, gates[0] @ w, first, multiply(gates.flatten(0, 1).t(), before(h, hs).flatten(0, 1))


# --- as kernels -----------------------------------------------------------------------------------------------------


def run(p: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """As :func:`layer`."""
    hidden, recurrent, started = h.shape[-1], w.t(), c
    a, hs, cs, ts = torch.empty_like(p), *(p.new_empty(*p.shape[:-1], hidden) for _ in range(3))
    i, f, g, o = gates_of(a)
    parts = p, a, a[..., : 2 * hidden], i, f, g, o, hs, cs, ts
    for projected, gates, both, i_, f_, g_, o_, h_, c_, t_ in steps_of(*parts):
        torch.add(projected, multiply(h, recurrent), out=gates)
        both.sigmoid_(), g_.tanh_(), o_.sigmoid_()
        c = torch.mul(f_, c, out=c_).addcmul_(i_, g_)
        h = torch.mul(o_, torch.tanh(c, out=t_), out=h_)
    m = torch.empty_like(a)
    slopes_(m, [g, before(started, cs), i, ts], a)
    return hs, cs, a, m, ts


def slopes_(into: Tensor, d: list[Tensor], a: Tensor) -> None:
    """Write d S(a) over ``into``, d being one tensor for each gate and S the slope of its activation."""
    kernels = (aten.sigmoid_backward, aten.sigmoid_backward, aten.tanh_backward, aten.sigmoid_backward)
    for kernel, change, value, target in zip(kernels, d, gates_of(a), gates_of(into), strict=True):
        kernel.grad_input(change, value, grad_input=target)


def slope_of_output(a: Tensor, t: Tensor) -> Tensor:
    """b."""
    return aten.tanh_backward(gates_of(a)[3], t)


def run_backward(
    gh: Tensor, gc: Tensor, a: Tensor, w: Tensor, m: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that reach the gates, the first c, all h' and all c' (u)."""
    gates, reached, u = torch.empty_like(a), gh.clone(), gc.clone()
    after: Tensor | None = None
    carried = u.new_zeros(())
    parts = gates, *by_factor(gates), *by_factor(m), reached, u, gates_of(a)[1], b
    for gates_, by_u, by_h, m_u, m_h, reached_, u_, f, back in reversed(list(steps_of(*parts))):
        if after is not None:
            reached_.add_(multiply(after, w))
        u_.add_(carried)
        u_.addcmul_(reached_, back)
        torch.mul(u_.unsqueeze(-2), m_u, out=by_u)
        torch.mul(reached_, m_h, out=by_h)
        after, carried = gates_, u_ * f
    return gates, carried, reached, u


def _backward(
    gh: Tensor, gc: Tensor, a: Tensor, cs: Tensor, c: Tensor, w: Tensor, m: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    return run_backward(gh, gc, a, w, m, slope_of_output(a, t))[:2]


LIBRARY.impl("lstm_layer", run, "CompositeExplicitAutograd")
LIBRARY.impl("lstm_layer_backward", _backward, "CompositeExplicitAutograd")
