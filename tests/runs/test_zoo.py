"""The zoo's judge on small modules of PyTorch: right, wrong and refused, by a reference that is neither side's."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from benchmarks.zoo.judge import Verdict, row
from benchmarks.zoo.problem import Problem
from benchmarks.zoo.run import isolated
from benchmarks.zoo.table import in_brief, page
from benchmarks.zoo.torch_models import cases


@pytest.fixture(autouse=True)
def _dtype() -> object:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def verdicts(name: str) -> list[str]:
    return [outcome["verdict"].value for outcome in row(cases()[f"torch/{name}"])["sides"].values()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weight_norm", ["right", "wrong", "wrong"]),
        ("ctc_loss", ["right", "refused", "refused"]),
        ("MultiheadAttention", ["right", "refused", "right"]),
        ("GELU", ["right", "right", "right"]),
        ("spectral_norm", ["right", "right", "right"]),  # differences see the vectors that it makes under no_grad
    ],
)
def test_verdicts(name: str, expected: list[str]) -> None:
    assert verdicts(name) == expected


def test_what_does_not_build_is_said() -> None:
    assert row(lambda: Problem(nn.Linear(2, 2), lambda: torch.zeros(()))) == {
        "not_built": "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"
    }


def test_tables_count_each_case_once() -> None:
    outcome = lambda verdict: {"verdict": Verdict(verdict), "error": 0.1, "message": ""}
    sides = ("imstep", "double backward", "double backward, math attention")
    rows = {
        "torch/a": {"sides": {s: outcome("right" if s == "imstep" else "wrong") for s in sides}},
        "timm/b": {"sides": {s: outcome("refused") for s in sides}},
        "timm/c": {"not_built": "ValueError: too large"},
    }
    record = {"runs": rows, "packages": {"timm": "1.0"}}
    assert "| imstep | 1 | 0 | 1 |" in in_brief(record)
    assert "| all | 2 | 1 / 0 / 1 | 0 / 1 / 1 | 0 / 1 / 1 |" in page(record)


def test_a_case_that_takes_too_long_is_stopped() -> None:
    assert isolated(lambda: time.sleep(5) or {}, 0.1) == {"failed": "took more than 0 s"}
