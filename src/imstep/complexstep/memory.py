"""Memory that is free stays at hand.

A replay makes and drops the same intermediate values again and again. The C library of Linux gives back to the system
what is dropped, and a page that comes from there anew takes longer than what is written into it: 3 µs for 4 KiB on a
virtual machine. It does so with tensors larger than any that was dropped before, and with what lies free at the end of
its heap beyond twice that size; both up to 32 and 64 MiB. So one such tensor, dropped before anything is written into
it, lets the library keep as much as it ever keeps.
"""

from __future__ import annotations

from functools import cache

import torch

_LARGEST = 2**25 - 2**16
"""Bytes: just below the 32 MiB from which on tensors are always given back."""


@cache
def keep_at_hand() -> None:
    """From now on the process keeps up to 64 MiB that tensors on the CPU have left."""
    torch.empty(_LARGEST, dtype=torch.uint8)
