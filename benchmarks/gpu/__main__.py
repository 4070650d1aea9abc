"""imstep on a GPU, within six minutes: checks, costs of products, training, and where the device waits.

    python -m benchmarks.gpu                        # on a CUDA card; writes record.json and docs/gpu.md
    python -m benchmarks.gpu --only checks          # one section; prints, writes nothing
    python -m benchmarks.gpu --device cpu --short   # the same program, small, on a CPU; prints, writes nothing
    python -m benchmarks.gpu --table                # the page again, from the record

Needs PyTorch and NumPy, and no network. Each section runs in a process of its own and within a time of its own; what it
has found by then is kept. A row that fails holds its error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu import checks, costs, stream, training
from benchmarks.gpu.table import text_of
from benchmarks.record_page import Row, load, now, path_of, show, writable
from imstep.runs.environment import environment
from imstep.runs.files import write_json

NAME = PAGE = "gpu"
Rows = Iterator[tuple[str, Callable[[], Row]]]
SECTIONS: dict[str, tuple[Callable[[torch.device, bool], Rows], float]] = {
    "checks": (checks.rows, 60.0),
    "costs": (costs.rows, 80.0),
    "physics": (training.physics_rows, 105.0),
    "autoencoder": (training.autoencoder_rows, 70.0),
    "stream": (stream.rows, 35.0),
}
"""What each runs, and the seconds that it has, its start included; together less than six minutes."""


def card() -> dict[str, str]:
    """The GPU, its driver and the libraries that PyTorch was built with."""
    if not torch.cuda.is_available():
        return {"GPU": "none"}
    found = torch.cuda.get_device_properties(0)
    return {
        "GPU": found.name,
        "memory": f"{found.total_memory / 2**30:.0f} GiB",
        "capability": f"{found.major}.{found.minor}",
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def work(rows: Rows) -> Iterator[Row]:
    """Each row with its name and seconds; one that fails with its error."""
    for name, run in rows:
        start = time.perf_counter()
        try:
            found = run()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}"
            found = {"failure": f"{type(error).__name__} at {at}: {str(error)[:300]}"}
        yield {"name": name, **found, "seconds taken": round(time.perf_counter() - start, 2)}


def collect(command: Sequence[str], limit: float) -> dict[str, Any]:
    """The rows that a process prints, one a line, until it ends or its time is over; and how it ended."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    rows: list[Row] = []
    start = time.perf_counter()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            print(*(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    code, seconds, late = process.wait(), time.perf_counter() - start, timer.finished.is_set()
    timer.cancel()
    ended = "finished" if code == 0 else "ran out of time" if late else f"died with exit code {code}"
    return {"ended": ended, "seconds": round(seconds, 1), "limit": limit, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to run; on a CPU nothing is written")
    parser.add_argument("--short", action="store_true", help="small sizes, to try the program; nothing is written")
    parser.add_argument("--only", choices=list(SECTIONS), help="one section; nothing is written")
    parser.add_argument("--table", action="store_true", help="write the page from the record")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        for row in work(SECTIONS[options.section][0](torch.device(options.device), options.short)):
            print(json.dumps({key: writable(value) for key, value in row.items()}), flush=True)
        return
    if options.table:
        show(NAME, PAGE, text_of(load(NAME)))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device. Run it where there is one, or try it by --device cpu --short.")
    start, own = time.perf_counter(), [sys.executable, "-m", "benchmarks.gpu", "--device", options.device]
    record: dict[str, Any] = {"date": now(), "environment": {**card(), **environment()}, "sections": {}}
    for name in [options.only] if options.only else SECTIONS:
        print(f"--- {name}", flush=True)
        command = [*own, "--section", name, *(["--short"] if options.short else [])]
        record["sections"][name] = collect(command, SECTIONS[name][1])
        record["seconds"] = round(time.perf_counter() - start, 1)
        if not (options.only or options.short or options.device == "cpu"):
            write_json(path_of(NAME), record)  # at once, should a later section end everything
    print(text_of(record))
    if path_of(NAME).exists() and not (options.only or options.short or options.device == "cpu"):
        show(NAME, PAGE, text_of(record))


if __name__ == "__main__":
    main()
