"""Small batches with the safeguards and without; whole: benchmarks/batches.py."""

from __future__ import annotations

import math

import pytest

from batches import run


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [32, 128, 512, None])
def test_safeguards_keep_the_held_out_loss_down(size: int | None, seed: int) -> None:
    row = run("digits-mlp", size, "defaults", seed, steps=15)
    assert row["steps"] == 15
    # The first step solves for its batch alone; with 32 examples it may go far beyond what suits the others.
    assert row["highest"] < (1.5 if size == 32 else 1.0) * row["start"]
    assert row["last"] < 0.5 * row["start"]


@pytest.mark.parametrize("size", [128, None])
def test_without_damping_and_monitor_it_diverges(size: int | None) -> None:
    row = run("digits-mlp", size, "defaults, neither", seed=0, steps=15)
    assert not math.isfinite(row["highest"]) or row["highest"] > 2 * row["start"]
