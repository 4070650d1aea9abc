"""Each example runs as a reader would run it, and reaches what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# What the last number of a line that begins so must not exceed.
PROMISES = {
    "derivatives": ("difference from double backward", 1e-14),
    "eigenvalues": ("largest disagreement", 1e-10),
    "poisson": ("largest error of u", 1e-3),
    "regression": ("loss after 25 steps", 1e-3),
}


def test_every_example_has_a_promise() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    start, bound = PROMISES[name]
    line = next(line for line in done.stdout.splitlines() if line.startswith(start))
    figures = [float(x) for x in re.findall(r"\d\.\d+e[+-]\d+|\b\d\.\de[+-]\d+", line)]
    assert figures, line
    assert max(figures) <= bound, line
