"""What a measurement ran on: versions and machine, written beside every figure."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy
import torch

import imstep

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """Versions, processor and threads: name -> text, in the order to show."""
    return {
        "imstep": imstep.__version__,
        "PyTorch": torch.__version__,
        "NumPy": numpy.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    """The processor's name as Linux reports it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} logical)" if names else platform.processor() or "unknown"
