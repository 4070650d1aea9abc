"""What every run's process has from the start: torch, and what its optimizers import when the first one is made."""

import torch._dynamo  # noqa: F401

import imstep.bench.work  # noqa: F401
