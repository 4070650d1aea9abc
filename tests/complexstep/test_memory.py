"""Memory that tensors have left is there for the next ones."""

import platform

import pytest
import torch

from imstep.complexstep.memory import keep_at_hand


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the C library of Linux")
def test_what_was_dropped_is_not_fetched_from_the_system_again():
    import resource

    keep_at_hand()
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**22)  # 16 MiB, 4096 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 100
