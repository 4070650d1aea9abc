"""Every entry of PyTorch's operator database, two samples each; ``benchmarks/coverage.py`` walks all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

WALK = Path(__file__).resolve().parents[2] / "benchmarks" / "operator_walk.py"
spec = importlib.util.spec_from_file_location("operator_walk", WALK)
assert spec is not None
assert spec.loader is not None
walk = importlib.util.module_from_spec(spec)
sys.modules["operator_walk"] = walk  # its dataclasses look their module up
spec.loader.exec_module(walk)

ENTRIES = {entry.formatted_name: entry for entry in walk.yardstick()}

# What has no rule; each must be refused by name, not computed wrongly.
UNSUPPORTED = {
    "sparse_sampled_addmm": "sparse tensors carry no imaginary part",
    "sparse_mm_reduce": "sparse tensors carry no imaginary part",
    "to_sparse": "sparse tensors carry no imaginary part",
}


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_operator(name: str) -> None:
    entry = walk.judge(ENTRIES[name], 2)
    if name in UNSUPPORTED:
        assert "UnsupportedOperatorError" in entry.worst.message
        pytest.xfail(UNSUPPORTED[name])
    assert entry.passed, f"{entry.worst.judgement.value}: {entry.worst.message} (error {entry.worst.error:.1e})"


def test_database_is_the_yardstick() -> None:
    """A smaller database would make a coverage figure meaningless."""
    if not torch.__version__.startswith("2.13"):
        pytest.skip("the count belongs to PyTorch 2.13")
    assert len(ENTRIES) == 540
