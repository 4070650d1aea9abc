"""The bench: many contestants on many tasks, each tuned alike and run from several seeds, every run kept."""

from imstep.bench.entries import ENTRIES, Entry, Measure, entry_of
from imstep.bench.sides import SIDES, Range, Side

__all__ = ["ENTRIES", "SIDES", "Entry", "Measure", "Range", "Side", "entry_of"]
