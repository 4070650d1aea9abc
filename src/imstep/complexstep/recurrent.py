"""Recurrent networks step by step: fused kernels hide the state that a derivative needs, and steps of many small
operators cost more than their arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from imstep.complexstep import gru_layer, lstm_layer, rnn_layer
from imstep.complexstep.layers_of_steps import before

_Direction = tuple[Tensor, tuple[Tensor, ...]]  # all h (time, batch, hidden), and the last state


def multiplied_within(
    weight: Tensor,
    bias: Tensor | None,
    inputs: Callable[[], Tensor],
    added: Tensor,
    at_product: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Tell whoever watches calls of layers that a weight has multiplied what no call shows.

    Args:
        weight, bias: of a product ``inputs @ weight.T + bias``.
        inputs: makes what was multiplied, (time, batch, in).
        added: what the product is added to, (time, batch, out).
        at_product: from the gradient there to the product's; None where they are the same.
    """
    if has_torch_function((weight,)):
        handle_torch_function(multiplied_within, (weight,), weight, bias, inputs, added, at_product)


def _biases(weights: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """That of the inputs, and that of the states."""
    return (weights[2], weights[3]) if len(weights) > 2 else (None, None)


def _projected(x: Tensor, weights: list[Tensor], backwards: bool, both: bool = True) -> Tensor:
    """The inputs times their weight, and their bias or both, in the order of the steps."""
    rows, (bias, of_states) = x.flatten(0, 1), _biases(weights)
    if bias is None or of_states is None:
        projected = rows @ weights[0].t()
    else:
        projected = torch.addmm(bias + of_states if both else bias, rows, weights[0].t())
    if not projected.requires_grad and torch.is_grad_enabled() and weights[1].requires_grad:
        projected.requires_grad_()  # the gradient that reaches these tells the rows of the recurrent weight
    projected = projected.unflatten(0, x.shape[:2])
    multiplied_within(weights[0], bias, lambda: x, projected)
    return projected.flip(0) if backwards else projected


def _tell_recurrent(
    weights: list[Tensor],
    h: Tensor,
    hs: Tensor,
    projected: Tensor,
    at_product: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """That states were multiplied, from the first h to the last but one."""
    multiplied_within(weights[1], _biases(weights)[1], lambda: before(h, hs), projected, at_product)


def _lstm_direction(x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor], backwards: bool) -> _Direction:
    h, c = state
    projected = _projected(x, weights, backwards)
    hs, cs = lstm_layer.apply(projected, h, c, weights[1])
    _tell_recurrent(weights, h, hs, projected)
    return hs.flip(0) if backwards else hs, (hs[-1], cs[-1])


def _gru_direction(x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor], backwards: bool) -> _Direction:
    (h,) = state
    projected = _projected(x, weights, backwards, both=False)
    hs, a = gru_layer.apply(projected, h, weights[1], _biases(weights)[1])
    _tell_recurrent(weights, h, hs, projected, lambda gradient: gru_layer.at_product(gradient, a))
    return hs.flip(0) if backwards else hs, (hs[-1],)


def _plain_direction(
    relu: bool, x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor], backwards: bool
) -> _Direction:
    projected = _projected(x, weights, backwards)
    hs = rnn_layer.apply(projected, state[0], weights[1], relu)
    _tell_recurrent(weights, state[0], hs, projected)
    return hs.flip(0) if backwards else hs, (hs[-1],)


def takes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the functions below cover a call of PyTorch's.

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


def rnn_tanh(x: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``torch.rnn_tanh`` for sequences of one length."""
    return _network(partial(_plain_direction, False), x, [state], *rest)


def rnn_relu(x: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``torch.rnn_relu`` for sequences of one length."""
    return _network(partial(_plain_direction, True), x, [state], *rest)
