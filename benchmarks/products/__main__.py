"""Hessian and Gauss-Newton products beside those of double backward, torch.func and other packages.

python -m benchmarks.products                        # everything; writes record.json and docs/products.md
python -m benchmarks.products --only LSTM --rounds 5 # one model; prints, writes nothing
python -m benchmarks.products --table                # the page again, from the record

Peers are optional: pip install -c constraints.txt '.[peers]'.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.products.measure import measure
from benchmarks.products.models import SUBJECTS
from benchmarks.products.table import page

HERE = Path(__file__).resolve().parent
RECORD = HERE / "record.json"
PAGE = HERE.parents[1] / "docs" / "products.md"
SEED = 0
_ORDER = ("LSTM", "PINN", "GPT", "MLP", "ResNet-18")  # on the page; the quick ones first
PACKAGES = ("imstep", "torch", "numpy", "curvlinops-for-pytorch", "PyHessian", "hessian-eigenthings")


def environment(threads: int) -> dict[str, Any]:
    """Versions and machine."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
        "seed": SEED,
        "dtype": "float32",
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = [line.split(":", 1) for line in lines if ":" in line]
    wanted = ("model name", "cpu family", "model")
    return ", ".join(
        f"{key} {value}" for key in wanted for value in [next((v.strip() for k, v in fields if k.strip() == key), "?")]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(options.threads)
        names = [options.only] if options.only else _ORDER
        record: dict[str, Any] = {**environment(options.threads), "devices": {}}
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            models = record["devices"][device] = {}
            for name in names:
                models[name] = measure(name, device, SEED, options.rounds)
                print(f"{device}, {name}: done, load average {os.getloadavg()[0]:.1f}", flush=True)
                if not options.only:  # what is measured stays, should a later model fail
                    RECORD.write_text(json.dumps(record, indent=1) + "\n")
        if options.only:
            print(page(record))
            return
    PAGE.write_text(page(json.loads(RECORD.read_text())))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
