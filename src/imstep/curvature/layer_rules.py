"""What layers do with their parameters: normalisations, convolutions, recurrent layers, tables, bilinear forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from imstep.complexstep.islands import plain
from imstep.complexstep.layers_of_steps import StepsFunction
from imstep.curvature.use import Found, Operand, Use, broadcast, signed

Addends = Callable[[Tensor], Tensor]
"""From the gradient at the output of an operator to what it adds to that of a parameter, entry by entry."""


def _scale_or_shift(p: Operand, over: Callable[[Operand, Addends], Found], normal: Callable[[], Tensor]) -> Found:
    """The second and third argument of a normalisation, of which ``normal`` makes what is scaled."""
    if p.at == 0:
        return None
    return over(p, (lambda d: d) if p.at == 2 else lambda d: d * normal())


def _layer_norm(p: Operand) -> Found:
    node = p.node
    normal = lambda: (plain(node._saved_input).detach() - node._saved_result1) * node._saved_result2
    return _scale_or_shift(p, broadcast, normal)


def _layer_norm_backward(p: Operand) -> Found:
    """A normalisation's gradient with respect to its input: symmetric in what it makes of grad_out · weight."""
    node = p.node
    if p.at == 5:
        return []  # the shift has no part in it
    if p.at != 4:
        return None

    def addends(d: Tensor) -> Tensor:
        over = tuple(range(-len(node._saved_normalized_shape), 0))
        rate = node._saved_rstd
        normal = (plain(node._saved_input).detach() - node._saved_mean) * rate
        along = d - d.mean(over, keepdim=True) - normal * (d * normal).mean(over, keepdim=True)
        return plain(node._saved_grad_out).detach() * rate * along

    return broadcast(p, addends)


def _batch_norm(p: Operand) -> Found:
    """By the running statistics, since those of the batch are of all residuals."""
    node = p.node
    if node._saved_training:
        return None

    def normal() -> Tensor:
        x = plain(node._saved_input).detach()
        shape = (-1, *(1,) * (x.ndim - 2))
        mean, var = (plain(t).detach().view(shape) for t in (node._saved_running_mean, node._saved_running_var))
        return (x - mean) * (var + node._saved_eps).rsqrt()

    return _scale_or_shift(p, _channels, normal)


def _group_norm(p: Operand) -> Found:
    node = p.node

    def normal() -> Tensor:
        x = plain(node._saved_input).detach()
        grouped = x.reshape(node._saved_N, node._saved_group, -1)
        # Those of groups have derivatives of their own, other than those of layers.
        mean, rate = (t.detach()[..., None] for t in (node._saved_result1, node._saved_result2))
        return ((grouped - mean) * rate).view_as(x)

    return _scale_or_shift(p, _channels, normal)


def _channels(p: Operand, addends: Addends) -> Found:
    """A number for each channel, the second dimension."""
    if p.transposed or p.stacked:
        return None
    return Use(p.parameter, p.edge, lambda d: addends(d).movedim(1, -1).reshape(-1, p.shape[0]))


def _convolution(p: Operand) -> Found:
    node, kernel, groups = p.node, p.shape[2:], p.node._saved_groups
    if p.at == 2:
        return Use(p.parameter, p.edge, lambda d: d.movedim(1, -1).reshape(-1, d.shape[1]))
    if p.at != 1 or p.transposed or p.stacked:
        return None
    settings = node._saved_padding, node._saved_stride, node._saved_dilation
    patches = lambda t: _patches(t, kernel, *settings)
    at_places = lambda t: t.movedim(1, -1).reshape(-1, t.shape[1])
    # Transposed, each input is multiplied by the weight onto a patch of the output; else each patch of the input.
    of_input, of_output = (at_places, patches) if node._saved_transposed else (patches, at_places)
    uses = []
    for g in range(groups):
        part = lambda t, g=g: t.chunk(groups, 1)[g]
        spread = lambda d, part=part: of_output(part(d))
        other = lambda part=part: of_input(part(plain(node._saved_input).detach()))
        uses.append(Use(p.parameter, p.edge, spread, other, node._saved_transposed, (g, groups)))
    return uses


def _patches(
    t: Tensor, kernel: Sequence[int], padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What a convolution's kernel meets at each place: (places, channels and entries of the kernel)."""
    t = F.pad(t, [n for fill in reversed(padding) for n in (fill, fill)])
    for at, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        t = t.unfold(at, (size - 1) * apart + 1, step)[..., ::apart]
    return t.movedim(1, 1 + len(kernel)).reshape(-1, t.shape[1] * math.prod(kernel))


def _recurrent(p: Operand) -> Found:
    """The weight and bias of the states in a layer that is one operator, by the gradient that reaches its inputs."""
    own = getattr(p.node, "_forward_cls", None)
    inputs, number = p.node.next_functions[0]
    if inputs is None or not (isinstance(own, type) and issubclass(own, StepsFunction)):
        return None
    edge, spread = GradientEdge(inputs, number), lambda d: own.at_product(p.node, d).flatten(0, 1)
    if p.at == own.BIAS:
        return Use(p.parameter, edge, spread)
    if p.at != own.WEIGHT:
        return None
    return Use(p.parameter, edge, spread, lambda: own.states(p.node).detach().flatten(0, 1), p.transposed)


def _embedding(p: Operand) -> Found:
    node = p.node
    if node._saved_scale_grad_by_freq or node._saved_sparse:
        return None
    index = lambda: plain(node._saved_indices).detach()
    return _looked_up(p, p.shape[:1], index, left_out=signed(node._saved_padding_idx)[0])


def _index_select(p: Operand) -> Found:
    if signed(p.node._saved_dim)[0] % len(p.shape):
        return None
    return _looked_up(p, p.shape[:1], lambda: plain(p.node._saved_index).detach())


def _gather(p: Operand) -> Found:
    dim, index = signed(p.node._saved_dim)[0], lambda: plain(p.node._saved_index).detach()
    return _looked_up(p, p.shape, lambda: _numbers(p, index()).gather(dim, index()))


def _take(p: Operand) -> Found:
    index = lambda: plain(p.node._saved_index).detach()
    return _looked_up(p, p.shape, lambda: _numbers(p, index()).take(index()))


def _numbers(p: Operand, like: Tensor) -> Tensor:
    """Of the entries of a parameter, in its shape."""
    return torch.arange(p.shape.numel(), device=like.device).view(p.shape)


def _index(p: Operand) -> Found:
    """A table that is looked up in its first dimensions."""
    saved = [None if t is None else plain(t) for t in p.node._saved_indices]
    count = sum(t is not None for t in saved)
    if any(t is None or t.dtype not in (torch.int64, torch.int32) for t in saved[:count]):
        return None
    sizes = p.shape[:count]

    def index() -> Tensor:
        one, *others = (t.detach().long() % n for t, n in zip(saved, sizes, strict=False) if t is not None)
        for t, n in zip(others, sizes[1:], strict=True):
            one = one * n + t
        return one

    return _looked_up(p, sizes, index)


def _looked_up(p: Operand, sizes: Sequence[int], index: Callable[[], Tensor], left_out: int = -1) -> Found:
    """Entries of a table, (*sizes, ...), at the places that ``index`` says: those at ``left_out`` have no gradient."""
    if p.transposed or p.stacked:
        return None
    rest = math.prod(p.shape[len(sizes) :])

    def places() -> Tensor:
        at = index().reshape(-1)
        hot = F.one_hot(at, math.prod(sizes)) * (at != left_out)[:, None]
        return hot.to(p.node._input_metadata[0].dtype)

    return Use(p.parameter, p.edge, lambda d: d.reshape(-1, rest), places, transposed=True)


def _trilinear(p: Operand) -> Found:
    """A factor of Σ i1 i2 i3, each with dimensions added along which it is expanded; all rows are along the first."""
    node = p.node
    expanded = [list(node._saved_expand1), list(node._saved_expand2), list(node._saved_expand3)]
    if p.transposed or p.stacked or expanded[p.at] != [0]:
        return None

    def addends(d: Tensor) -> Tensor:
        whole = _unsqueezed(d, node._saved_sumdim)
        for at, t in enumerate((node._saved_i1, node._saved_i2, node._saved_i3)):
            if at != p.at:
                whole = whole * _unsqueezed(plain(t).detach(), expanded[at])
        return whole.expand(-1, *p.shape).flatten(1)

    return Use(p.parameter, p.edge, addends)


def _unsqueezed(t: Tensor, dims: Sequence[int]) -> Tensor:
    """With dimensions of length 1 at some places of the result."""
    for dim in sorted(dims):
        t = t.unsqueeze(dim)
    return t


LAYER_RULES: dict[str, Callable[[Operand], Found]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "NativeLayerNormBackwardBackward0": _layer_norm_backward,
    "NativeBatchNormBackward0": _batch_norm,
    "NativeGroupNormBackward0": _group_norm,
    "ConvolutionBackward0": _convolution,
    "LayerBackward": _recurrent,
    "EmbeddingBackward0": _embedding,
    "GatherBackward0": _gather,
    "IndexBackward0": _index,
    "IndexSelectBackward0": _index_select,
    "TakeBackward0": _take,
    "TrilinearBackward0": _trilinear,
}
"""For each operator of a layer, what tells how a parameter is used in it."""
