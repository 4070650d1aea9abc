"""Matrices with planted spectra; the tests' own, independent of imstep."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
