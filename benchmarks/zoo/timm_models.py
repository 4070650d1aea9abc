"""One network of each family (module) of timm, the smallest that it names, made smaller where its class lets one.

timm wants pictures of a size, often 224 x 224; families that let one choose get 64 x 64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.zoo.problem import Problem, draw, scalar

LARGEST = 5_000_000  # parameters
CLASSES, BATCH = 5, 4  # batch statistics of two are ill-conditioned
_SMALL = (
    "test_", "atto", "femto", "pico", "nano", "xxs", "xx_small", "xxtiny", "xtiny", "xs", "tiny", "mini", "small", "b0",
    "s0", "m0", "t0", "t8", "050", "035", "s050", "_ti", "_t", "14", "18", "s12", "_s", "h1",
)  # fmt: skip
_NUMBERS = {
    "embed_dim": 32, "depth": 2, "num_heads": 2, "dim": 32, "inner_dim": 8, "stem_hidden_dim": 8, "growth_rate": 8,
    "base_width": 8, "num_init_features": 16,
}  # fmt: skip
_WIDTHS = (16, 32, 32, 64)
_LISTS: dict[str, tuple[int, ...]] = {
    "depths": (1,), "layers": (1,), "num_heads": (2,), "embed_dims": _WIDTHS, "dims": _WIDTHS, "channels": _WIDTHS,
    "block_config": (2,), "stages": (1,), "hidden_sizes": (8, 8, 16, 16),
}  # fmt: skip
_OTHERS = {"naflexvit": {"embed_dim": 32, "depth": 2, "num_heads": 2}}  # by fields of a configuration
_PICTURES = (32, 64, 96, 224)


def cases() -> dict[str, Callable[[], Problem]]:
    """Name -> how to build it."""
    families = [family for family in timm.list_modules() if timm.list_models(module=family)]
    return {f"timm/{family}": partial(build, family) for family in families}


def build(family: str) -> Problem:
    """The first way of making a family's smallest network small that works."""
    name = min(timm.list_models(module=family), key=_rank)
    with torch.device("meta"):
        whole = timm.create_model(name)
    smaller = _smaller(type(whole)) or _OTHERS.get(family, {})
    ways = [{**smaller, "img_size": 64}, smaller, {"img_size": 64}, {}]
    errors = []
    for way in ways:
        try:
            return _built(name, way)
        except Exception as error:  # sizes that do not go together: try the next
            errors.append(error)
    raise errors[-1]


def _smaller(kind: type) -> dict[str, Any]:
    """Small values for those arguments of a class that are sizes."""
    found: dict[str, Any] = {}
    for key, parameter in inspect.signature(kind).parameters.items():
        listed = isinstance(parameter.default, (tuple, list)) or key not in _NUMBERS
        if listed and key in _LISTS:
            length = len(parameter.default) if isinstance(parameter.default, (tuple, list)) else 4
            found[key] = tuple(_LISTS[key][min(at, len(_LISTS[key]) - 1)] for at in range(length))
        elif not listed:
            found[key] = _NUMBERS[key]
    return found


def _rank(name: str) -> tuple[int, int]:
    """Names of small networks first."""
    return next((at for at, word in enumerate(_SMALL) if word in name), len(_SMALL)), len(name)


def _built(name: str, way: dict[str, Any]) -> Problem:
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in timm.create_model(name, num_classes=CLASSES, **way).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} has {size:,} parameters")
    model = timm.create_model(name, num_classes=CLASSES, **way).train()
    for picture in [way["img_size"]] if "img_size" in way else _PICTURES:
        try:
            with torch.no_grad():
                model(torch.zeros(BATCH, 3, picture, picture))
        except Exception:  # too small for its windows or strides, or of a fixed size
            continue
        return Problem(model, partial(_loss, model, draw(BATCH, 3, picture, picture)))
    raise ValueError(f"{name} takes no picture of {_PICTURES}")


def _loss(model: nn.Module, images: Tensor) -> Tensor:
    return scalar(model(images.to(next(model.parameters()).dtype)))
