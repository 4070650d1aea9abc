"""Selections of combinations in which all pairs, or triples, of choices occur."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence


def covering(sizes: Sequence[int], strength: int = 2, seed: int = 0, candidates: int = 30) -> list[tuple[int, ...]]:
    """Rows of choices, the i-th below sizes[i], in which any choices of any ``strength`` factors occur together.

    Each row begins with a set of choices that is missing; of some such rows, filled up greedily in a random order, the
    one is taken that covers most.

    Source: Cohen, Dalal, Fredman and Patton, The AETG system, IEEE Trans. Software Eng. 23 (1997), p. 437.
    """
    draw = random.Random(seed)
    sets = list(itertools.combinations(range(len(sizes)), strength))
    missing = {(at, values) for at in sets for values in itertools.product(*(range(sizes[i]) for i in at))}
    rows = []
    while missing:
        first = min(missing)
        made = [_row(first, sizes, missing, strength, draw) for _ in range(candidates)]
        best = max(made, key=lambda row: sum((at, tuple(row[i] for i in at)) in missing for at in sets))
        missing -= {(at, tuple(best[i] for i in at)) for at in sets}
        rows.append(best)
    return rows


def _row(
    first: tuple[tuple[int, ...], tuple[int, ...]],
    sizes: Sequence[int],
    missing: set[tuple[tuple[int, ...], tuple[int, ...]]],
    strength: int,
    draw: random.Random,
) -> tuple[int, ...]:
    row = dict(zip(*first, strict=True))
    for i in draw.sample([i for i in range(len(sizes)) if i not in row], len(sizes) - strength):
        gains = []
        for value in range(sizes[i]):
            chosen = {**row, i: value}
            some = (tuple(sorted((*rest, i))) for rest in itertools.combinations(row, strength - 1))
            gains.append((sum((at, tuple(chosen[j] for j in at)) in missing for at in some), draw.random(), value))
        row[i] = max(gains)[2]
    return tuple(row[i] for i in range(len(sizes)))
