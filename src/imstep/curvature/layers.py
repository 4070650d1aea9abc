"""Watching the layers of a model: which parameters multiply what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from imstep.complexstep.islands import plain, unseen
from imstep.complexstep.recurrent import multiplied_within

_LAST = -1


@dataclass(frozen=True, eq=False)
class LayerUse:
    """One use of a weight as a matrix: y = W a + b for every row a.

    Attributes:
        weight, bias: positions among the parameters; bias None without one.
        inputs: a, (rows, in), with a column of ones appended if there is a bias.
        edge: where autograd's graph leaves the layer, before anything overwrites its output.
        channels: dimension of the output that W's rows belong to.
        at_product: from the gradient at the edge to that at y; None where they are the same.
    """

    weight: int
    bias: int | None
    inputs: Tensor
    edge: GradientEdge
    channels: int
    at_product: Callable[[Tensor], Tensor] | None = None

    def gradient(self, at_edge: Tensor | None) -> Tensor | None:
        """The gradient at y, from that at the edge; None for none."""
        if at_edge is None or self.at_product is None:
            return at_edge
        return plain(self.at_product(at_edge)).detach()


class LayerObserver(TorchFunctionMode):
    """Collects the uses of parameters as matrices: linear layers, recurrent ones, convolutions (1d and 2d, one group).

    Args:
        parameters: those to look for.
        largest: widest input or output of a layer that is collected; wider ones are passed over.
    """

    def __init__(self, parameters: Sequence[Tensor], largest: int = 4096) -> None:
        super().__init__()
        self._largest = largest
        self._position = {id(p): at for at, p in enumerate(parameters)}
        self.uses: list[LayerUse] = []

    def fresh(self) -> LayerObserver:
        """An observer of the same layers that has seen nothing."""
        other = copy(self)
        other.uses = []
        return other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        like = next((kind for kind in types if not issubclass(kind, Tensor)), None)
        if like is not None:  # an object in place of a tensor, which calls the function with what it stands for
            with self:
                return like.__torch_function__(func, types, args, kwargs)
        output = func(*args, **kwargs)
        if func is F.linear or func is torch.conv2d or func is torch.conv1d:
            self._note(func, output, *args, **kwargs)
        elif func is multiplied_within:
            weight, bias, inputs, added, at_product = args
            self._take(weight, bias, added, _LAST, lambda: plain(inputs()).detach(), at_product)
        return output

    def _note(
        self,
        func: Any,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        rows = lambda: plain(input).detach()
        if func is F.linear:
            self._take(weight, bias, output, _LAST, rows)
        else:
            self._take(weight, bias, output, 1, lambda: _patches(func, rows(), weight, *args, **kwargs))

    def _take(
        self,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
        channels: int,
        rows: Callable[[], Tensor | None],
        at_product: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Keep a use, if the weight is one of those looked for, and autograd's graph leads to the output."""
        at = self._position.get(id(weight))
        if at is None or max(len(weight), weight.numel() // max(len(weight), 1)) > self._largest:
            return
        with unseen():  # the methods of a subclass as well
            differentiated = output.requires_grad and not output.is_complex()
            if not differentiated or torch._C._functorch.is_functorch_wrapped_tensor(output):
                return
            # Of a view its base, which the layer has computed: a view's own node is replaced when it is overwritten.
            own: Any = output._base if output._is_view() else output
            edge, channels = get_gradient_edge(own), channels % own.ndim
        at_bias = None if bias is None else self._position.get(id(bias))
        with torch._C._DisableTorchDispatch():  # no part of the evaluation
            found = rows()
            if found is None:
                return
            found = found.reshape(found.shape[:-1].numel(), found.shape[-1])  # of a layer without inputs, too
            if at_bias is not None:
                found = torch.cat([found, found.new_ones(len(found), 1)], dim=1)
        self.uses.append(LayerUse(at, at_bias, found, edge, channels, at_product))


def _patches(
    func: Any,
    input: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """The rows (batch, positions, in · kernel) that a convolution multiplies; None where that is not so simple."""
    if groups != 1 or input.ndim != weight.ndim:
        return None
    if isinstance(padding, str):
        input, padding = _padded(input, weight, dilation) if padding == "same" else input, 0
    flat = func is torch.conv1d
    pair = lambda v, fill: (fill, v if isinstance(v, int) else v[0]) if flat else v
    if flat:
        input, weight = input.unsqueeze(2), weight.unsqueeze(2)
    patches = F.unfold(input, weight.shape[2:], pair(dilation, 1), pair(padding, 0), pair(stride, 1))
    return patches.transpose(1, 2)


def _padded(input: Tensor, weight: Tensor, dilation: Any) -> Tensor:
    """The input with the zeros of padding="same"; where their number is odd, one more comes after it than before."""
    added: list[int] = []
    for at in reversed(range(weight.ndim - 2)):  # the last dimension first
        step = dilation if isinstance(dilation, int) else dilation[at]
        total = step * (weight.shape[at + 2] - 1)
        added += [total // 2, total - total // 2]
    return F.pad(input, added)
