"""Run a function in a process of its own, for a limited time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Row = dict[str, Any]


def isolated(work: Callable[[], Row], limit: float) -> Row:
    """What `work` returns; {"failed": reason} where it dies or takes longer than `limit` seconds.

    The process is forked from this one, so that packages are imported once.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return {"failed": f"took more than {limit:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"failed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receiver.close()


def _report(work: Callable[[], Row], sender: Connection) -> None:
    sender.send(work())
    sender.close()
    os._exit(0)  # without the exit handlers of what was forked
