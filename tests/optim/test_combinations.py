"""Strategies go together, whatever is chosen; more of them: ``benchmarks/combinations``."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.combinations.__main__ import CHOICES, Combination, outcome, selection
from benchmarks.combinations.covering import covering


@pytest.mark.parametrize("combination", selection(2), ids="; ".join)
def test_no_fault(combination: Combination) -> None:
    """No step that was rejected is repeated, no loss raised, no claim wrong; only a fixed step may go to and fro."""
    row = outcome(combination)
    assert row["fault"] == ""
    assert row["end"] in ("minimum", "max_iterations") or row["step"] == "fixed"


@pytest.mark.parametrize("strength", [2, 3])
def test_all_choices_occur_together(strength: int) -> None:
    sizes = [3, 2, 4, 2, 2]
    rows = covering(sizes, strength)
    assert len(rows) < 48
    for at in itertools.combinations(range(len(sizes)), strength):
        wanted = set(itertools.product(*(range(sizes[i]) for i in at)))
        assert {tuple(row[i] for i in at) for row in rows} == wanted


def test_pairs_of_choices_are_few() -> None:
    assert len(selection(2)) <= 60
    assert max(map(len, CHOICES)) ** 2 == 49
