"""For all tests: one thread each, since several run side by side, and the same examples in every run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch
from hypothesis import settings

torch.set_num_threads(1)
# HYPOTHESIS_PROFILE=default draws new examples in every run.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# torch.manual_seed writes down the stack for each kind of device that is not there, which takes longer than many tests.
for device, module in ((torch.cuda, torch.cuda.random), (torch.xpu, torch.xpu.random), (torch.mtia, torch.mtia)):
    if not device.is_available():
        module._lazy_call = lambda callable, **kwargs: None
