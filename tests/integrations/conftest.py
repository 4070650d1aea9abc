"""Examples of frameworks, and the numbers that they end with."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the folder's helpers can be imported

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "frameworks"


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Frameworks set dtypes and write files; DeepXDE asks for its backend when it is imported."""
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    monkeypatch.chdir(tmp_path)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def final_loss(capsys: pytest.CaptureFixture[str]) -> Callable[[str], float]:
    """Runs an example as a program; the number in its last words, "final loss ..."."""

    def run(name: str) -> float:
        runpy.run_path(str(EXAMPLES / f"with_{name}.py"), run_name="__main__")
        (found,) = re.findall(r"final loss (\S+)", capsys.readouterr().out)
        return float(found)

    return run
