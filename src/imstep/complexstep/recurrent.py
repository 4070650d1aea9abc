"""LSTM and GRU networks step by step: the fused kernels hide the state that a derivative needs.

One direction of one layer of an LSTM is one operator. A step of it:

    i, f, g, o = a = (sigmoid, sigmoid, tanh, sigmoid)(p + W h)
    c' = f c + i g,    t = tanh c',    h' = o t

Backward, with u = gc' + gh' o (1 - t²) the gradient that reaches c':

    ggates = (u g, u c, u i, gh' t) S(a),    gc = u f,    gh = Wᵀ ggates
    S = (i (1 - i), f (1 - f), 1 - g², o (1 - o))

PyTorch's own steps take a dozen operators and three times as many backward; each costs more than its arithmetic here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_Direction = tuple[Tensor, tuple[Tensor, ...]]  # all h (time, batch, hidden), and the last state

_LIBRARY = torch.library.Library("imstep", "DEF")
_LIBRARY.define("lstm_layer(Tensor p, Tensor h, Tensor c, Tensor w) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "lstm_layer_backward(Tensor gh, Tensor gc, Tensor a, Tensor cs, Tensor c, Tensor w) -> (Tensor, Tensor)"
)


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h, c', a) of one step: gates (batch, 4 hidden), c (batch, hidden)."""
    i, f, g, o = gates.chunk(4, 1)
    a = torch.cat([torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)], 1)
    i, f, g, o = a.chunk(4, 1)
    after = f * c + i * g
    return o * torch.tanh(after), after, a


def slope(a: Tensor) -> Tensor:
    """S(a), shape of a (..., 4 hidden)."""
    i, f, g, o = a.chunk(4, -1)
    return torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)


def layer(p: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All h, c and a (time, batch, ...) for projected inputs p (time, batch, 4 hidden) and the first state."""
    recurrent = w.t()
    states = []
    for projected in p.unbind(0):
        h, c, a = cell(torch.addmm(projected, h, recurrent), c)
        states.append((h, c, a))
    hs, cs, activations = (torch.stack(s) for s in zip(*states, strict=True))
    return hs, cs, activations


def before(first: Tensor, later: Tensor) -> Tensor:
    """What each step starts from: the first state, and all others but the last."""
    return torch.cat([first.unsqueeze(0), later[:-1]])


@dataclass(frozen=True)
class Backward:
    """A backward pass through a layer, all steps together: the gradients, and the factors that made them."""

    gates: Tensor
    first_c: Tensor
    gh: Tensor
    u: Tensor
    t: Tensor
    back: Tensor
    to_gates: Tensor


def backward_steps(
    gh: Tensor, gc: Tensor, a: Tensor, cs: Tensor, c: Tensor, w: Tensor, ga: Tensor | None = None
) -> Backward:
    """The backward pass from the gradients of all h, c and a."""
    i, f, g, o = a.chunk(4, -1)
    t, s = torch.tanh(cs), slope(a)
    back, to_gates = o * (1 - t * t), torch.cat([g, before(c, cs), i, t], -1) * s
    direct = None if ga is None else ga * s
    steps: list[tuple[Tensor, ...]] = []
    carried = torch.zeros_like(c)
    for at in reversed(range(len(cs))):
        reached = torch.addmm(gh[at], steps[-1][0], w) if steps else gh[at]
        u = torch.addcmul(gc[at] + carried, reached, back[at])
        gates = torch.cat([u, u, u, reached], 1) * to_gates[at]
        steps.append((gates if direct is None else gates + direct[at], reached, u))
        carried = u * f[at]
    all_gates, all_reached, all_u = (torch.stack(s) for s in zip(*steps[::-1], strict=True))
    return Backward(all_gates, carried, all_reached, all_u, t, back, to_gates)


def layer_backward(
    gh: Tensor, gc: Tensor, a: Tensor, cs: Tensor, c: Tensor, w: Tensor, ga: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients that reach the gates (time, batch, 4 hidden) and the first c, from those of all h, c and a."""
    made = backward_steps(gh, gc, a, cs, c, w, ga)
    return made.gates, made.first_c


_LIBRARY.impl("lstm_layer", layer, "CompositeExplicitAutograd")
_LIBRARY.impl("lstm_layer_backward", layer_backward, "CompositeExplicitAutograd")


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hs, cs, a = torch.ops.imstep.lstm_layer(p, h, c, w)
        ctx.save_for_backward(hs, cs, a, h, c, w)
        ctx.set_materialize_grads(False)
        return hs, cs, a

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, ...]:
        gh, gc, ga = gradients
        hs, cs, a, h, c, w = ctx.saved_tensors
        gh = torch.zeros_like(cs) if gh is None else gh
        gc = torch.zeros_like(cs) if gc is None else gc
        if torch.is_grad_enabled() or ga is not None:
            gates, first = layer_backward(gh, gc, a, cs, c, w, ga)
        else:
            gates, first = torch.ops.imstep.lstm_layer_backward(gh, gc, a, cs, c, w)
        return gates, gates[0] @ w, first, gates.flatten(0, 1).t() @ before(h, hs).flatten(0, 1)


def _lstm_direction(x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor], backwards: bool) -> _Direction:
    bias = weights[2] + weights[3] if len(weights) > 2 else None
    projected = F.linear(x, weights[0], bias)
    hs, cs, _ = _Layer.apply(projected.flip(0) if backwards else projected, *state, weights[1])
    return hs.flip(0) if backwards else hs, (hs[-1], cs[-1])


def _gru_direction(x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor], backwards: bool) -> _Direction:
    (h,) = state
    bias, recurrent_bias = (weights[2], weights[3]) if len(weights) > 2 else (None, None)
    size = h.shape[-1]
    outputs = []
    steps = F.linear(x, weights[0], bias).unbind(0)
    for projected in reversed(steps) if backwards else steps:
        own = F.linear(h, weights[1], recurrent_bias)
        reset, update = torch.sigmoid(projected[:, : 2 * size] + own[:, : 2 * size]).chunk(2, 1)
        new = torch.tanh(projected[:, 2 * size :] + reset * own[:, 2 * size :])
        h = new + update * (h - new)
        outputs.append(h)
    return torch.stack(outputs[::-1] if backwards else outputs), (h,)


def takes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether :func:`lstm` and :func:`gru` cover a call of PyTorch's.

    They leave packed sequences, projections, autocast, function transforms and checkpoints (which would come
    back to PyTorch's own) to the original.
    """
    if kwargs or not isinstance(args[3], bool):  # packed sequences have their batch sizes among the arguments
        return False
    states = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    x = args[0]
    return (
        x.dim() == 3
        and x.numel() > 0
        and x.is_floating_point()
        and all(s.shape[-1] == states[0].shape[-1] for s in states)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def _network(
    direction: Callable[..., _Direction],
    x: Tensor,
    states: Sequence[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """All layers and directions; returns the outputs and the last states."""
    x = x.transpose(0, 1) if batch_first else x
    per, directions = (4 if has_biases else 2), (2 if bidirectional else 1)
    last = []
    for layer in range(layers):
        outputs = []
        for at in range(layer * directions, (layer + 1) * directions):
            own = list(weights[at * per : (at + 1) * per])
            y, final = direction(x, tuple(s[at] for s in states), own, bool(at % directions))
            outputs.append(y)
            last.append(final)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < layers - 1:
            x = F.dropout(x, dropout, True)
    finals = (torch.stack(s) for s in zip(*last, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *finals)


def lstm(x: Tensor, states: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """``torch.lstm`` for sequences of one length."""
    return _network(_lstm_direction, x, states, *rest)


def gru(x: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``torch.gru`` for sequences of one length."""
    return _network(_gru_direction, x, [state], *rest)
