"""Shared by the tests of optimizers: the folder's helpers, and test functions of the benchmarks, can be imported."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Last, since a file there may bear the name of an installed package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
