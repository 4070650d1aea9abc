"""Hugging Face's Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

import imstep  # noqa: E402
from imstep.integrations.accelerate import ClosureStep  # noqa: E402
from imstep.optim import NoPreconditioning  # noqa: E402

X = torch.linspace(-1, 1, 32)[:, None]
Y = (4 * X).sin()


def afresh() -> None:
    """Accelerate keeps one state in a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    afresh()
    yield
    afresh()


def prepared(**options: Any) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1))
    newton = imstep.NewtonKrylov(model.parameters(), preconditioning=NoPreconditioning())
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model, optimizer = accelerator.prepare(model, newton)
    return accelerator, model, optimizer, newton


def test_example(final_loss: Callable[[str], float]) -> None:
    """`accelerator.prepare`, `optimizer.step(closure)`, `mixed_precision="bf16"`"""
    assert final_loss("accelerate") < 1e-3


def test_save_and_load(tmp_path: Path) -> None:
    """`save_state` and `load_state`"""
    accelerator, model, optimizer, newton = prepared()
    closure = lambda: nn.functional.mse_loss(model(X), Y)
    optimizer.step(closure)
    accelerator.save_state(str(tmp_path))
    optimizer.step(closure)
    first = newton.last_step
    accelerator.load_state(str(tmp_path))
    optimizer.step(closure)
    assert newton.last_step.new_loss == first.new_loss


def test_accumulated_batches_are_one_batch() -> None:
    """`accumulate` by `imstep.integrations.accelerate.ClosureStep`: the batches enter one step"""
    _, whole, _, newton = prepared()
    newton.step(lambda: nn.functional.mse_loss(whole(X), Y))
    afresh()
    accelerator, model, optimizer, parts = prepared(gradient_accumulation_steps=2)
    step = ClosureStep(accelerator, optimizer)
    returned = []
    for x, y in zip(X.chunk(2), Y.chunk(2), strict=True):
        with accelerator.accumulate(model):
            returned.append(step(lambda x, y: nn.functional.mse_loss(model(x), y), x, y))
    assert returned[0] is None
    assert isinstance(returned[1], Tensor)
    assert float(returned[1]) == pytest.approx(newton.last_step.loss, rel=1e-5)
    assert parts.last_step.new_loss == pytest.approx(newton.last_step.new_loss, rel=1e-3)


@pytest.mark.parametrize(
    ("attributes", "words"), [({"scaler": object()}, "bf16"), ({"num_processes": 2}, "num_processes 1")]
)
def test_refused(attributes: dict[str, Any], words: str) -> None:
    """`ClosureStep` refuses `mixed_precision="fp16"`, and several processes without `process_group=`"""
    from types import SimpleNamespace

    one = SimpleNamespace(**{"scaler": None, "num_processes": 1, "mixed_precision": "fp16", **attributes})
    with pytest.raises(ValueError, match=words):
        ClosureStep(one, None)
