"""LSTM and GRU networks step by step: the fused kernels hide the state that a derivative needs.

The cell of an LSTM is one operator:

    i, f, g, o = a = (sigmoid, sigmoid, tanh, sigmoid)(gates)
    c' = f c + i g,    t = tanh c',    h = o t

Backward, with u = gc' + gh o (1 - t²) the gradient that reaches c':

    ggates = (u g, u c, u i, gh t) S(a),    gc = u f,    S = (i (1 - i), f (1 - f), 1 - g², o (1 - o))

PyTorch's own steps take a dozen operators and three times as many backward; each costs more than its arithmetic here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_Direction = tuple[Tensor, tuple[Tensor, ...]]  # all h (time, batch, hidden), and the last state

_LIBRARY = torch.library.Library("imstep", "DEF")
_LIBRARY.define("lstm_cell(Tensor gates, Tensor c) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define("lstm_cell_backward(Tensor gh, Tensor gc, Tensor a, Tensor c, Tensor c2) -> (Tensor, Tensor)")


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h, c', a) of one step: gates (batch, 4 hidden), c (batch, hidden)."""
    i, f, g, o = gates.chunk(4, 1)
    a = torch.cat([torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)], 1)
    i, f, g, o = a.chunk(4, 1)
    after = f * c + i * g
    return o * torch.tanh(after), after, a


def slope(a: Tensor) -> Tensor:
    """S(a), (batch, 4 hidden)."""
    i, f, g, o = a.chunk(4, 1)
    return torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], 1)


def cell_backward(gh: Tensor, gc: Tensor, a: Tensor, c: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(ggates, gc) of one step."""
    i, f, g, o = a.chunk(4, 1)
    t = torch.tanh(after)
    u = gc + gh * o * (1 - t * t)
    return torch.cat([u * g, u * c, u * i, gh * t], 1) * slope(a), u * f


_LIBRARY.impl("lstm_cell", cell, "CompositeExplicitAutograd")
_LIBRARY.impl("lstm_cell_backward", cell_backward, "CompositeExplicitAutograd")


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, after, a = torch.ops.imstep.lstm_cell(gates, c)
        ctx.save_for_backward(a, c, after)
        ctx.set_materialize_grads(False)
        return h, after, a

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor]:
        gh, gc, ga = gradients
        a, c, after = ctx.saved_tensors
        gh = torch.zeros_like(c) if gh is None else gh
        gc = torch.zeros_like(c) if gc is None else gc
        step = cell_backward if torch.is_grad_enabled() else torch.ops.imstep.lstm_cell_backward
        ggates, gbefore = step(gh, gc, a, c, after)
        return ggates if ga is None else ggates + ga * slope(a), gbefore


def _lstm_direction(x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor], backwards: bool) -> _Direction:
    h, c = state
    bias = weights[2] + weights[3] if len(weights) > 2 else None
    recurrent = weights[1].t()
    outputs = []
    steps = F.linear(x, weights[0], bias).unbind(0)
    for projected in reversed(steps) if backwards else steps:
        h, c, _ = _Cell.apply(torch.addmm(projected, h, recurrent), c)
        outputs.append(h)
    return torch.stack(outputs[::-1] if backwards else outputs), (h, c)


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
