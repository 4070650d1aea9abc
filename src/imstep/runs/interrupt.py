"""Ctrl-C as a request that the training loop answers when its step is done."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Interrupt"]


class Interrupt:
    """While active, the first SIGINT or SIGTERM sets `requested`; a second raises KeyboardInterrupt at once.

    Args:
        notify: called on the first signal, to tell the user that the step is being finished.
        at_once: whether a second signal ends it; not under torchrun, which repeats the first, and ends processes itself
            after 30 seconds.

    Use it in the main thread only; Python delivers signals nowhere else.
    """

    def __init__(self, notify: Callable[[], None] = lambda: None, at_once: bool = True) -> None:
        self.requested = False
        self._notify, self._at_once = notify, at_once
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if self._at_once:
                raise KeyboardInterrupt
            return
        self.requested = True
        self._notify()
