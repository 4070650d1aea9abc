"""Products of two plain matrices, by the faster of PyTorch's kernels.

In single precision on a CPU PyTorch multiplies matrices by MKL, and convolves by oneDNN. oneDNN multiplies matrices as
well, with the widest instructions of any processor, where MKL keeps to narrower ones unless it is Intel's: on an AMD
EPYC with AVX-512 it takes less than half of the time. On one with AVX2 alone it is as fast at best, and takes up to
twice the time for a layer of 100 to 200 units. It cannot differentiate, which a replay has no need of.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ENOUGH = 2**20
"""Multiplications above which a call of oneDNN, about 10 µs dearer than one of MKL, pays. Measured on an AMD EPYC."""

WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether the processor has instructions that MKL may leave unused."""

OPERATOR = torch.ops.mkldnn._linear_pointwise.default if torch._C._has_mkldnn else None
"""(X, W, ...) -> X Wᵀ; None where PyTorch was built without oneDNN."""


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """A B for matrices (m, k) and (k, n)."""
    if not pays(a, b):
        return torch.mm(a, b)
    # oneDNN copies a left factor that lies in columns; the other one is free to lie as it likes.
    if a.stride(1) != 1 and (b.stride(1) != 1 or b.shape[1] < a.shape[0]):
        return _linear(b.t(), a).t()
    return _linear(a, b.t())


def multiply_onto(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """C + A B in the memory of C."""
    return c.add_(multiply(a, b)) if pays(a, b) else c.addmm_(a, b)


def _linear(x: Tensor, w: Tensor) -> Tensor:
    """X Wᵀ."""
    if not (w.is_contiguous() or w.t().is_contiguous()):  # oneDNN has no fast kernel for it
        w = w.contiguous()
    assert OPERATOR is not None
    return OPERATOR(x, w, None, "none", [], "")


def pays(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN can multiply the matrices, and does it faster."""
    return (
        WIDE
        and a.dtype is torch.float32
        and b.dtype is torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] >= _ENOUGH
        and a.device.type == "cpu"
        and torch._C._get_mkldnn_enabled()
        and OPERATOR is not None
        and not _differentiated(a, b)
    )


def _differentiated(a: Tensor, b: Tensor) -> bool:
    """Whether autograd is to see the product, which oneDNN would hide from it."""
    if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return False
    return not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
