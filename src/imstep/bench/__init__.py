"""The bench: many contestants on many tasks, each tuned alike and run from several seeds, every run kept."""

from imstep.bench.entries import ENTRIES, FULL, entry_of
from imstep.bench.entry import Entry, Measure
from imstep.bench.sides import SIDES, Range, Side

__all__ = ["ENTRIES", "FULL", "SIDES", "Entry", "Measure", "Range", "Side", "entry_of"]
