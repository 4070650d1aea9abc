"""LSTM networks step by step, with one operator for a cell: the fused kernels hide the state that a derivative needs.

    i, f, g, o = a = (sigmoid, sigmoid, tanh, sigmoid)(gates)
    c' = f c + i g,    t = tanh c',    h = o t

Backward, with u = gc' + gh o (1 - t²) the gradient that reaches c':

    ggates = (u g, u c, u i, gh t) S(a),    gc = u f,    S = (i (1 - i), f (1 - f), 1 - g², o (1 - o))

PyTorch's own steps take a dozen operators and three times as many backward; each costs more than its arithmetic here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def _direction(
    x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], backwards: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer: x (time, batch, features); returns all h (time, batch, hidden), the last h and c."""
    bias = weights[2] + weights[3] if len(weights) > 2 else None
    recurrent = weights[1].t()
    outputs = []
    steps = F.linear(x, weights[0], bias).unbind(0)
    for projected in reversed(steps) if backwards else steps:
        h, c, _ = _Cell.apply(torch.addmm(projected, h, recurrent), c)
        outputs.append(h)
    return torch.stack(outputs[::-1] if backwards else outputs), h, c


def takes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether :func:`lstm` covers a call of ``torch.lstm``.

    It leaves packed sequences, projections, autocast, function transforms and checkpoints (which would come
    back to PyTorch's own) to the original.
    """
    if kwargs or isinstance(args[1], Tensor) or args[1][0].shape[-1] != args[1][1].shape[-1]:
        return False
    x = args[0]
    return (
        x.dim() == 3
        and x.numel() > 0
        and x.is_floating_point()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def lstm(
    x: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm`` for sequences of one length."""
    x = x.transpose(0, 1) if batch_first else x
    per, directions = (4 if has_biases else 2), (2 if bidirectional else 1)
    hs, cs = [], []
    for layer in range(layers):
        outputs = []
        for at in range(layer * directions, (layer + 1) * directions):
            own = list(weights[at * per : (at + 1) * per])
            y, h, c = _direction(x, state[0][at], state[1][at], own, bool(at % directions))
            outputs.append(y)
            hs.append(h)
            cs.append(c)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < layers - 1:
            x = F.dropout(x, dropout, True)
    return x.transpose(0, 1) if batch_first else x, torch.stack(hs), torch.stack(cs)
