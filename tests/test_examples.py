"""Each example runs as a program does, and reaches what it promises."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# What the last number of a line that begins so must not exceed.
PROMISES = {
    "derivatives": ("difference from double backward", 1e-14),
    "eigenvalues": ("largest disagreement", 1e-10),
    "operator_network": ("relative error for new functions", 1e-2),
    "poisson": ("largest error of u", 1e-3),
    "processes": ("loss after 25 steps", 1e-4),
    "regression": ("loss after 25 steps", 1e-3),
}


def test_every_example_has_a_promise() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PROMISES)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", PROMISES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    start, bound = PROMISES[name]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(start))
    figures = [float(x) for x in re.findall(r"\d\.\d+e[+-]\d+|\b\d\.\de[+-]\d+", line)]
    assert figures, line
    assert max(figures) <= bound, line
