"""Every entry of PyTorch's operator database, a sample or two each; ``benchmarks/coverage`` walks all of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.coverage import directional_walk, operator_walk
from benchmarks.coverage.operator_walk import Entry

ENTRIES = {entry.formatted_name: entry for entry in operator_walk.yardstick()}

# What has no rule; each must be refused by name, not computed wrongly.
UNSUPPORTED = {
    "sparse_sampled_addmm": "sparse tensors carry no imaginary part",
    "sparse_mm_reduce": "sparse tensors carry no imaginary part",
    "to_sparse": "sparse tensors carry no imaginary part",
}
# A kernel of PyTorch 2.14's database whose backward pass hides what a derivative needs, called by itself.
ONCE = {"torch_ops_aten__scaled_dot_product_flash_attention_for_cpu"}


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_operator(name: str) -> None:
    """A Hessian product of one sample, and directional derivatives of two."""
    _expect(operator_walk.judge(ENTRIES[name], 1), name in UNSUPPORTED or name in ONCE)
    _expect(directional_walk.judge_directional(ENTRIES[name], 2), name in UNSUPPORTED)


def _expect(entry: Entry, refused: bool) -> None:
    if refused:
        assert "UnsupportedOperatorError" in entry.worst.message
        return
    assert entry.passed, f"{entry.worst.judgement.value}: {entry.worst.message} (error {entry.worst.error:.1e})"


def test_database_is_the_yardstick() -> None:
    """A smaller database would make a coverage figure meaningless."""
    if not torch.__version__.startswith("2.13"):
        pytest.skip("the count belongs to PyTorch 2.13")
    assert len(ENTRIES) == 540
