"""The checks of `benchmarks.gpu`, and a step of each known method, on a device that stands in for a GPU.

    python -m benchmarks.gpu.stand_in    # builds stand_in.cpp, a minute by g++; prints what is off, writes nothing

It has memory and random numbers of its own, mixtures of devices are errors, and its kernels are the CPU's, so that
results are the CPU's as well. It shows faults of devices, nothing of speed or rounding.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from benchmarks.gpu import checks
from benchmarks.gpu.__main__ import work
from benchmarks.gpu.table import TOLERANCES
from benchmarks.record_page import Row
from imstep import methods
from imstep.complexstep.rules import cells

SOURCE = Path(__file__).with_name("stand_in.cpp")
NAME = "standin"
LEFT_OUT = ("Fourier layer",)  # complex views crash in the stand-in
CELLS = {
    "_thnn_fused_lstm_cell": cells.lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": cells.lstm_cell_backward,
    "_thnn_fused_gru_cell": cells.gru_cell,
    "_thnn_fused_gru_cell_backward": cells.gru_cell_backward,
}


def load() -> torch.library.Library:
    """Build the device and take it up; gone when what is returned goes."""
    torch.utils.rename_privateuse1_backend(NAME)
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "stand_in.so"
        paths = [f"-I{p}" for p in (*include_paths(), sysconfig.get_paths()["include"])]
        libraries = [f"-L{p}" for p in library_paths()] + ["-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"]
        flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-DTORCH_EXTENSION_NAME={NAME}"]
        subprocess.run(["g++", *flags, *paths, str(SOURCE), "-o", str(built), *libraries], check=True)
        spec = importlib.util.spec_from_file_location(NAME, built)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    module = ModuleType(f"torch.{NAME}")
    shown: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=0: torch.get_rng_state(),  # its draws without a generator are the CPU's
        "set_rng_state": lambda state, device=0: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
    }
    vars(module).update(shown)
    torch._register_device_module(NAME, module)
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in {**CELLS, "convolution_overrideable": _convolution}.items():
        library.impl(name, kernel, "PrivateUse1")
    library.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    return library


def _convolution(x: Tensor, w: Tensor, b: Tensor | None, *rest: Any) -> Tensor:
    return torch.convolution(x.cpu(), w.cpu(), None if b is None else b.cpu(), *rest).to(x.device)


def _convolution_backward(g: Tensor, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    found = torch.ops.aten.convolution_backward(g.cpu(), x.cpu(), w.cpu(), [g.shape[1]], *rest)
    return tuple(None if t is None else t.to(g.device) for t in found)


def stepped(name: str, device: torch.device) -> Row:
    """How far three steps of a known method on the device lead from where those on the CPU do."""
    ends = []
    for network in (checks.built("Tanh").to(device), checks.built("Tanh")):
        method = getattr(methods, name)(network.parameters)
        for _ in range(3):
            method.step(network.closure)
        ends.append(checks.flat(network.parameters, network.parameters))
    return {"parameters": checks.relative(*ends)}


def rows(device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    """All checks."""
    yield from ((name, run) for name, run in checks.rows(device, short=False) if name not in LEFT_OUT)
    yield from ((name, partial(stepped, name, device)) for name in methods.__all__ if name != "sketchy_svrg")


def main() -> None:
    library = load()
    found = list(work(rows(torch.device(NAME))))
    off = [row for row in found if "failure" in row or not all(_close(row, key) for key in TOLERANCES)]
    print(f"{len(found) - len(off)} of {len(found)} agree", *off, sep="\n")
    del library
    sys.exit(bool(off))


def _close(row: Row, key: str) -> bool:
    value = row.get(key, 0.0)
    # PyTorch's double backward is wrong for a network with weight norm: differences judge.
    return key == "double backward" or not isinstance(value, float) or value <= TOLERANCES[key]


if __name__ == "__main__":
    main()
