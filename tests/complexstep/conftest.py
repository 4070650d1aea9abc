"""The walks over PyTorch's databases live under ``benchmarks/``, which is no package."""

import sys
from pathlib import Path

# Last, since a file there may bear the name of an installed package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
