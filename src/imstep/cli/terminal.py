"""The console that commands print to."""

from __future__ import annotations

from rich.console import Console


def terminal(stderr: bool = False, quiet: bool = False) -> Console:
    """One that prints names as they are, where rich would make a picture of the end of ``module:SOAP:``."""
    return Console(stderr=stderr, quiet=quiet, emoji=False)
