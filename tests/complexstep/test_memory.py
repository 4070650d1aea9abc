"""Memory that tensors have left is there for the next ones."""

import platform
import subprocess
import sys

import pytest

from imstep.complexstep import memory

# In a process of its own: libraries that other tests import may have set what the C library keeps.
_PROGRAM = """
import resource, runpy, sys, torch
runpy.run_path(sys.argv[1])["keep_at_hand"]()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**22)  # 16 MiB, 4096 pages
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the C library of Linux")
def test_what_was_dropped_is_not_fetched_from_the_system_again():
    command = [sys.executable, "-c", _PROGRAM, memory.__file__]
    assert int(subprocess.run(command, capture_output=True, check=True, text=True).stdout) < 100
