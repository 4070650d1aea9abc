"""Memory that is free stays at hand.

A replay makes and drops the same intermediate values again and again. The C library of Linux gives back to the system
what is dropped, and a page that comes from there anew takes longer than what is written into it: 3 µs for 4 KiB on a
virtual machine, 10,000 pages for a product of a small transformer.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of the settings, `man mallopt`."""

_LARGEST, _TOGETHER = 2**25, 2**28
"""Bytes of a tensor that is kept, and of all that lies free at the end of the heap."""


@cache
def keep_at_hand() -> bool:
    """From now on the process keeps up to 256 MiB that tensors on the CPU have left; whether it does.

    Environment variables that set the same go first.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _TOGETHER))
