"""Every module of PyTorch's own module database, in train and eval mode."""

from __future__ import annotations

import pytest
import torch

from benchmarks.coverage import module_walk

MODULES = {info.name: info for info in module_walk.modules()}


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str) -> None:
    """Hessian products against double backward or differences, directional derivatives against reverse mode."""
    products, slopes = module_walk.judge_module(MODULES[name])
    assert slopes.passed, slopes.worst
    if name in module_walk.EXPLAINED:
        pytest.xfail(module_walk.EXPLAINED[name])
    assert products.passed, products.worst


def test_database_is_the_yardstick() -> None:
    """A smaller database would make a coverage figure meaningless."""
    if not torch.__version__.startswith("2.13"):
        pytest.skip("the count belongs to PyTorch 2.13")
    assert len(MODULES) == 114
