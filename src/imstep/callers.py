"""Where in their code users have called the library."""

from __future__ import annotations

import sys


def users_level() -> int:
    """The ``stacklevel`` of a warning at the user's call: schedulers, profilers and contexts wrap steps."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        frame, level = frame.f_back, level + 1
    return level


_PASSED = ("imstep", "torch", "contextlib")
