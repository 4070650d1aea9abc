"""The rules of PyTorch's operators, one file per family, and the fallback to PyTorch's decompositions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from imstep.complexstep.registry import definition
from imstep.complexstep.rules.lists import on_lists

_FAMILIES = (
    "constant",
    "linear",
    "multilinear",
    "products",
    "grouped",
    "elementwise",
    "special",
    "binary",
    "activations",
    "piecewise",
    "selection",
    "indexing",
    "reductions",
    "complex_tensors",
    "factorisations",
    "linalg",
    "convolution",
    "batchnorm",
    "normalisation",
    "pooling",
    "losses",
    "margins",
    "distances",
    "bags",
    "segments",
    "recurrence",
    "gated_units",
    "cells",
    "random",
    "quantised",
    "collectives",
)


def load() -> None:
    """Enter all rules into the registry."""
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")


@cache
def decomposition(func: OpOverload) -> Callable[..., Any] | None:
    """A function that computes ``func`` by simpler operators, or None."""
    own = definition(func) or on_lists(func)
    if own is not None:
        return own
    implementation = getattr(func, "impl_aten", None)
    if implementation is not None:  # torch._prims: the operators that decompositions are written in
        return implementation
    if func._can_decompose():
        return func.decompose
    for home in ("torch._decomp.decompositions", "torch._refs"):  # they enter decompositions when imported
        importlib.import_module(home)
    return torch._decomp.decomposition_table.get(func)
