"""One step of an LSTM or GRU by the fused kernels that PyTorch takes on a GPU; it has none of them on a CPU.

With i, f, o logistic functions and g a tanh of gates, which are sums of an input's and a state's share and biases,

    LSTM:  c' = f c + i g,   h' = o tanh(c');    GRU:  n = tanh(a_n + r b_n),   h' = n + z (h - n)

where a and b are those shares. What a kernel keeps for its backward pass is laid out as PyTorch's is.
"""

from __future__ import annotations

import torch

from imstep.complexstep.registry import defined_as

aten = torch.ops.aten


def _with(gates, bias):
    return gates if bias is None else gates + bias


def _slope(gate):
    """Of a logistic function, by its value."""
    return gate * (1 - gate)


@defined_as(aten._thnn_fused_lstm_cell.default)
def lstm_cell(own, recurrent, c, own_bias=None, recurrent_bias=None):
    i, f, g, o = (_with(own, own_bias) + _with(recurrent, recurrent_bias)).chunk(4, 1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    return o * torch.tanh(c), c, torch.cat([i, f, g, o], 1)


@defined_as(aten._thnn_fused_lstm_cell_backward_impl.default)
def lstm_cell_backward(from_h, from_c, c, new_c, kept, has_bias):
    i, f, g, o = kept.chunk(4, 1)
    t = torch.tanh(new_c)
    zeros = torch.zeros_like(new_c)
    from_h, from_c = (zeros if found is None else found for found in (from_h, from_c))
    from_c = from_c + from_h * o * (1 - t * t)
    gates = torch.cat(
        [from_c * g * _slope(i), from_c * c * _slope(f), from_c * i * (1 - g * g), from_h * t * _slope(o)], 1
    )
    return gates, from_c * f, gates.sum(0) if has_bias else None


@defined_as(aten._thnn_fused_gru_cell.default)
def gru_cell(own, recurrent, h, own_bias=None, recurrent_bias=None):
    a, b = _with(own, own_bias).chunk(3, 1), _with(recurrent, recurrent_bias).chunk(3, 1)
    r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
    n = torch.tanh(a[2] + r * b[2])
    return n + z * (h - n), torch.cat([r, z, n, h, b[2]], 1)


@defined_as(aten._thnn_fused_gru_cell_backward.default)
def gru_cell_backward(from_h, kept, has_bias):
    r, z, n, h, b = kept.chunk(5, 1)
    from_n = from_h * (1 - z) * (1 - n * n)
    shared = from_n * b * _slope(r), from_h * (h - n) * _slope(z)
    own, recurrent = torch.cat([*shared, from_n], 1), torch.cat([*shared, from_n * r], 1)
    return own, recurrent, from_h * z, *((t.sum(0) if has_bias else None) for t in (own, recurrent))
