"""Simple operators in place of fused kernels that hide what a derivative needs.

The fused attention and recurrent kernels compute their backward pass from hidden state that no rule can reach; the
mathematical formulations they stand for are used instead, whatever backend the user has chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import resolve_name

from imstep.complexstep import recurrent
from imstep.complexstep.report import Ledger
from imstep.complexstep.substitutes import SUBSTITUTES

_STEPWISE: dict[Any, Any] = {
    torch.lstm: recurrent.lstm,
    torch.gru: recurrent.gru,
    torch.rnn_tanh: recurrent.rnn_tanh,
    torch.rnn_relu: recurrent.rnn_relu,
}
_RECURRENT = set(_STEPWISE)
_ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}

_FLATTEN = torch._cudnn_rnn_flatten_weight

STEERED = _RECURRENT | _ATTENTION | set(SUBSTITUTES) | {_FLATTEN}
"""The functions that :func:`steer` takes."""


def steer(func: Any, args: Any, kwargs: Any, ledger: Ledger) -> Any:
    """Call one of :data:`STEERED` so that it runs no kernel without a derivative; notes those avoided."""
    if func is _FLATTEN:
        return None  # cuDNN is not asked; weights that are moved would leave their imaginary parts behind
    if func in SUBSTITUTES:
        return _substitute(func, args, kwargs, ledger)
    if func in _ATTENTION:
        _note_attention(func, args, kwargs, ledger)
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)
    ledger.avoid(_name(func))
    if func in _STEPWISE and recurrent.takes(args, kwargs):
        return _STEPWISE[func](*args)
    with _native_recurrence():
        return func(*args, **kwargs)

_MATH = torch.backends.cuda.enable_math_sdp
_BACKENDS: list[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch.backends.cuda.math_sdp_enabled, _MATH),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch._C._get_overrideable_sdp_enabled, torch._C._set_sdp_use_overrideable),  # as sdpa_kernel() does
]
"""What asks for a backend of attention, and what sets it; :func:`sdpa_kernel` takes ten times as long."""


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by PyTorch's mathematical formulation, also where no Python function asks for it."""
    before = [(use, is_used()) for is_used, use in _BACKENDS]
    for use, _ in before:
        use(use is _MATH)
    try:
        yield
    finally:
        for use, used in before:
            use(used)


@contextmanager
def _native_recurrence() -> Iterator[None]:
    """Recurrent networks step by step (torch.backends.mkldnn.flags warns of other settings that it touches)."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _name(func: Any) -> str:
    return resolve_name(func) or str(getattr(func, "__name__", func))


_OF_NUMPY = {"keepdims": "keepdim", "axis": "dim", "x1": "input", "a": "input", "x": "input", "x2": "other"}
"""Names of arguments that PyTorch takes in place of its own."""


def _substitute(func: Any, args: Any, kwargs: Any, ledger: Ledger) -> Any:
    stands_in, needed = SUBSTITUTES[func]
    if kwargs.get("out") is not None:  # which autograd does not differentiate
        return func(*args, **kwargs)
    if func is not torch.segment_reduce:
        kwargs = {_OF_NUMPY.get(k, k): v for k, v in kwargs.items() if k != "out"}
    named = next((k for k in ("input", "A", "data", "abs") if k in kwargs), None)
    if named is not None:  # what PyTorch calls the first argument
        args, kwargs = (kwargs[named], *args), {k: v for k, v in kwargs.items() if k != named}
    if not needed(*args, **kwargs):
        return func(*args, **kwargs)
    ledger.avoid(_name(func))
    return stands_in(*args, **kwargs)


def _note_attention(func: Any, args: Any, kwargs: Any, ledger: Ledger) -> None:
    if func is F.scaled_dot_product_attention:
        ledger.avoid(_name(func))
        return
    # What PyTorch calls from here is out of sight: attention without weights is the fused one.
    if not kwargs.get("need_weights", True):
        ledger.avoid(_name(F.scaled_dot_product_attention))
    recorded = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
    if not kwargs.get("training", True) and not recorded:
        ledger.avoid("torch._native_multi_head_attention")
