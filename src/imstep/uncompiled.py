"""Calls that code which ``torch.compile`` compiles makes as they are."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

_SPECIAL = ("__init__", "__matmul__", "__rmatmul__")

_disabled = functools.cache(torch.compiler.disable)


def uncompiled(called: _T) -> _T:
    """A function that runs uncompiled, also where compiled code calls it; or a class whose public methods do.

    The compiler is not imported, which would take seconds: where it is not loaded yet, nothing is compiled.
    """
    if isinstance(called, type):
        for name, member in list(vars(called).items()):
            if name.startswith("_") and name not in _SPECIAL:
                continue
            if inspect.isfunction(member):
                setattr(called, name, uncompiled(member))
            elif isinstance(member, classmethod):
                setattr(called, name, classmethod(uncompiled(member.__func__)))
        return called

    @functools.wraps(called)  # type: ignore[arg-type]
    def call(*args: Any, **kwargs: Any) -> Any:
        run: Any = _disabled(called) if "torch._dynamo" in sys.modules else called
        return run(*args, **kwargs)

    return call  # type: ignore[return-value]
