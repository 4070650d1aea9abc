"""Lets torchvision be imported beside a CPU build of PyTorch that its own operators were not built for.

timm and transformers import torchvision for picture transforms. It registers formulas for its C++ operators on import,
which fails where these could not be loaded; declaring them is enough, since no network here calls them.
"""

from __future__ import annotations

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
try:
    import torchvision
except RuntimeError:
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}{_SCHEMA}")
    import torchvision  # noqa: F401
