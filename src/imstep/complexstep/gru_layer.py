"""One direction of one layer of a GRU as one operator, forward and backward.

    r, z, n = a = (sigmoid(p_r + o_r), sigmoid(p_z + o_z), tanh(p_n + r q)),   o = W h + b,   q = o_n
    h' = n + z (h - n)

The reset gate stands before the recurrent part of n, its bias included, so that b is no part of p. Backward, with gh'
the gradient that reaches h' from outside and e that from there and from the step after:

    e = gh' + gh of the step after,    go = e k,    gp = (go_r, go_z, e s),    gh = z e + Wᵀ go
    s = (1 - z) (1 - n²),    k = (s q r (1 - r), (h - n) z (1 - z), s r)

The formulas stand here twice, as :mod:`imstep.complexstep.layers_of_steps` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imstep.complexstep.gemm import multiply, multiply_onto
from imstep.complexstep.layers_of_steps import LIBRARY, StepsFunction, before, steps_of

aten = torch.ops.aten

LIBRARY.define("gru_layer(Tensor p, Tensor h, Tensor w, Tensor? b) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    "gru_layer_backward(Tensor gh, Tensor a, Tensor q, Tensor hs, Tensor h, Tensor w, Tensor k) "
    "-> (Tensor, Tensor, Tensor)"
)


def apply(p: Tensor, h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """All h and all a (time, batch, ...) for projected inputs p (time, batch, 3 hidden) and the first h.

    Args:
        p, h: as above.
        w, b: of the product with h, (3 hidden, hidden) and (3 hidden,); None for no bias.
    """
    hs, a, *_ = Layer.apply(p, h, w, b)
    return hs, a


def gates_of(t: Tensor) -> tuple[Tensor, ...]:
    """The parts of a tensor (..., 3 hidden) that belong to r, z and n."""
    return t.chunk(3, -1)


def by_gate(t: Tensor) -> Tensor:
    """A tensor (..., 3 hidden) as (..., 3, hidden)."""
    return t.unflatten(-1, (3, -1))


def at_product(gradient: Tensor, a: Tensor) -> Tensor:
    """go, from gp and the activations; gp may have its rows in one dimension."""
    of_r, of_z, of_n = gates_of(gradient)
    return torch.cat([of_r, of_z, of_n * gates_of(a)[0].reshape(of_n.shape)], -1)


# --- as operators ---------------------------------------------------------------------------------------------------


def layer(p: Tensor, h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
    """All h, a, q and k (time, batch, ...)."""
    started, steps = h, []
    for projected in p.unbind(0):
        own_r, own_z, q = gates_of(h @ w.t() if b is None else h @ w.t() + b)
        of_r, of_z, of_n = gates_of(projected)
        r, z = torch.sigmoid(of_r + own_r), torch.sigmoid(of_z + own_z)
        n = torch.tanh(of_n + r * q)
        h = n + z * (h - n)
        steps.append((h, torch.cat([r, z, n], 1), q))
    hs, a, qs = (torch.stack(s) for s in zip(*steps, strict=True))
    return hs, a, qs, _factors(a, qs, before(started, hs))


def _factors(a: Tensor, q: Tensor, started: Tensor) -> Tensor:
    """k."""
    r, z, n = gates_of(a)
    s = (1 - z) * (1 - n * n)
    return torch.cat([s * q * (r * (1 - r)), (started - n) * (z * (1 - z)), s * r], -1)


def layer_backward(
    gh: Tensor,
    a: Tensor,
    q: Tensor,
    hs: Tensor,
    h: Tensor,
    w: Tensor,
    *_: Tensor,
    ga: Tensor | None = None,
    gq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that reach p, o (time, batch, 3 hidden) and the first h, from those of all h, a and q."""
    r, z, n = gates_of(a)
    k, s = _factors(a, q, before(h, hs)), (1 - z) * (1 - n * n)
    factors = torch.cat([*gates_of(k)[:2], s], -1)
    direct = None if ga is None else _direct(ga, a, q)
    own: list[Tensor] = []
    steps: list[Tensor] = []
    carried = torch.zeros_like(h)
    for at in reversed(range(len(hs))):
        e = gh[at] + carried
        gates = torch.cat([e, e, e], 1) * factors[at]
        steps.append(gates if direct is None else gates + direct[at])
        of_r, of_z, of_n = gates_of(steps[-1])
        of_n = of_n * r[at]
        own.append(torch.cat([of_r, of_z, of_n if gq is None else of_n + gq[at]], 1))
        carried = e * z[at] + own[-1] @ w
    return torch.stack(steps[::-1]), torch.stack(own[::-1]), carried


def _direct(ga: Tensor, a: Tensor, q: Tensor) -> Tensor:
    """The part of gp that comes from the gradients of the activations themselves."""
    r, z, n = gates_of(a)
    of_r, of_z, of_n = gates_of(ga)
    of_n = of_n * (1 - n * n)
    return torch.cat([(of_r + of_n * q) * (r * (1 - r)), of_z * (z * (1 - z)), of_n], -1)


class Layer(StepsFunction):
    """The operator, which autograd differentiates."""

    WEIGHT, BIAS = 2, 3

    @staticmethod
    def states(ctx: Any) -> Tensor:
        hs, _, _, h, *_ = ctx.saved_tensors
        return before(h, hs)

    @staticmethod
    def at_product(ctx: Any, gradient: Tensor) -> Tensor:
        return at_product(gradient, ctx.saved_tensors[1].detach())

    @staticmethod
    def forward(ctx: Any, p: Tensor, h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        hs, a, q, k = torch.ops.imstep.gru_layer(p, h, w, b)
        ctx.save_for_backward(hs, a, q, h, w, k)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(k)
        return hs, a, q, k

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gh, ga, gq, _ = gradients
        hs, a, q, h, w, k = ctx.saved_tensors
        gh = torch.zeros_like(hs) if gh is None else gh
        if torch.is_grad_enabled() or ga is not None or gq is not None:
            gp, own, first = layer_backward(gh, a, q, hs, h, w, ga=ga, gq=gq)
        else:
            gp, own, first = torch.ops.imstep.gru_layer_backward(gh, a, q, hs, h, w, k)
        rows = own.flatten(0, 1)
        of_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return gp, first, multiply(rows.t(), before(h, hs).flatten(0, 1)), of_bias


# --- as kernels -----------------------------------------------------------------------------------------------------


def run(p: Tensor, h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
    """As :func:`layer`."""
    hidden, recurrent, started = h.shape[-1], w.t(), h
    a, hs, q = p.new_empty(p.shape), *(p.new_empty(*p.shape[:-1], hidden) for _ in range(2))
    of_both, of_n = p.split((2 * hidden, hidden), -1)
    if b is not None:
        of_both = of_both + b[: 2 * hidden]
    bias = p.new_zeros(()) if b is None else b[2 * hidden :]
    r, z, n = gates_of(a)
    for of_both_, of_n_, both, r_, z_, n_, q_, h_ in steps_of(of_both, of_n, a[..., : 2 * hidden], r, z, n, q, hs):
        own_both, own = multiply(h, recurrent).split((2 * hidden, hidden), 1)
        torch.add(of_both_, own_both, out=both).sigmoid_()
        torch.add(own, bias, out=q_)
        torch.addcmul(of_n_, r_, q_, out=n_).tanh_()
        h = torch.lerp(n_, h, z_, out=h_)
    return hs, a, q, _run_factors(a, q, before(started, hs))


def slope_of_new(a: Tensor) -> Tensor:
    """s."""
    _, z, n = gates_of(a)
    return aten.tanh_backward(1 - z, n)


def _run_factors(a: Tensor, q: Tensor, started: Tensor) -> Tensor:
    """As :func:`_factors`."""
    (r, z, n), k = gates_of(a), torch.empty_like(a)
    of_r, of_z, of_n = gates_of(k)
    s = slope_of_new(a)
    aten.sigmoid_backward.grad_input(s * q, r, grad_input=of_r)
    aten.sigmoid_backward.grad_input(started - n, z, grad_input=of_z)
    torch.mul(s, r, out=of_n)
    return k


def go_back_(reached: Tensor, own: Tensor, w: Tensor, k: Tensor, z: Tensor) -> None:
    """Add what comes from the steps after, step by step; of ``reached`` and ``own`` a step may be a block of k.

    Args:
        reached: (time + 1, ..., batch, hidden), the gradient of the first h and all e, contiguous.
        own: (time, ..., batch, 3 hidden), go, contiguous.
        w, k, z: as above.
    """
    parts = own, by_gate(own), by_gate(k), reached[:-1], reached[1:], z
    for own_, into, k_, below, e, z_ in reversed(list(steps_of(*parts))):
        into.addcmul_(e.unsqueeze(-2), k_)
        multiply_onto(below.view(-1, below.shape[-1]), own_.view(-1, own_.shape[-1]), w)
        below.addcmul_(e, z_)


def run_backward(gh: Tensor, a: Tensor, w: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that reach p, o, the first h and all h (e)."""
    reached = gh.new_empty(len(gh) + 1, *gh.shape[1:])
    reached[0].zero_()
    reached[1:].copy_(gh)
    own = k.new_zeros(k.shape)
    go_back_(reached, own, w, k, gates_of(a)[1])
    gp = own.clone()
    torch.mul(reached[1:], slope_of_new(a), out=gates_of(gp)[2])
    return gp, own, reached[0], reached[1:]


def _backward(
    gh: Tensor, a: Tensor, q: Tensor, hs: Tensor, h: Tensor, w: Tensor, k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gp, own, first, _ = run_backward(gh, a, w, k)
    return gp, own, first.clone()


LIBRARY.impl("gru_layer", run, "CompositeExplicitAutograd")
LIBRARY.impl("gru_layer_backward", _backward, "CompositeExplicitAutograd")
