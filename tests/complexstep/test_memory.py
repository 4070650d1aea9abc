"""The C library is asked to keep the memory that tensors have left, unless the user has told it otherwise."""

import os
import platform

import pytest

from imstep.complexstep.memory import keep_at_hand

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the C library of Linux")


def test_it_takes_the_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    assert keep_at_hand.__wrapped__()


def test_settings_of_the_user_go_first(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_at_hand.__wrapped__()
