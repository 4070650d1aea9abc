"""What frameworks do with an optimizer, in a few lines each: these tests need none of them."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conventions import X, Y, net, plainly
from torch import Tensor, nn

import imstep

METHODS = [imstep.NewtonKrylov, imstep.LeastSquares]

# --- closures as frameworks make them ------------------------------------------------------------------------------


class Automatic:
    """Lightning's automatic optimisation: the closure runs the step, empties gradients, goes backward, clips."""

    def __init__(self, model: nn.Module, clip: float | None = None, accumulate: int = 1) -> None:
        self.model, self.clip, self.accumulate, self.batches = model, clip, accumulate, 0

    def closure(self, first: bool) -> Tensor:
        loss = F.mse_loss(self.model(X), Y) / self.accumulate
        if first:
            self.model.zero_grad()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        return loss

    def batch(self, optimizer: Any) -> Any:
        closure = partial(self.closure, self.batches % self.accumulate == 0)
        self.batches += 1
        return optimizer.step(closure=closure) if self.batches % self.accumulate == 0 else closure()


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_as_lightnings(method: Any) -> None:
    model = net()
    optimizer = method(model.parameters())
    loop = Automatic(model)
    assert [float(loop.batch(optimizer)) for _ in range(3)] == pytest.approx(plainly(method, 3), rel=1e-9)
    assert {"lr"} <= set(optimizer.param_groups[0]) & set(optimizer.defaults)  # as LearningRateMonitor reads


@pytest.mark.parametrize("options", [{"clip": 1e-3}, {"accumulate": 2}])
@pytest.mark.parametrize("method", METHODS)
def test_clipping_and_accumulation_are_refused(method: Any, options: dict[str, Any]) -> None:
    model = net()
    optimizer, loop = method(model.parameters()), Automatic(model, **options)
    if loop.accumulate > 1:
        loop.batch(optimizer)  # a backward pass alone
    with pytest.raises(ValueError, match=r"clipping|earlier batches"):
        loop.batch(optimizer)


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_as_skorchs(method: Any) -> None:
    """It keeps what its first call saw, and passes the optimizer's class its groups and lr."""
    model, stored = net(), []
    optimizer = method([{"params": list(model.parameters())}], lr=1.0)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        stored.append(loss.item())
        return loss

    optimizer.step(step)
    assert stored[0] == pytest.approx(plainly(method, 1)[0])


@pytest.mark.parametrize("method", METHODS)
def test_who_looks_whether_a_closure_is_needed(method: Any) -> None:
    """neurodiffeq looks at the signature, also below a schedule's wrapper."""
    optimizer = method(net().parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_that_keeps_its_graph_and_returns_a_number(method: Any) -> None:
    """As Scimba's."""
    model, loss = net(), torch.zeros(())
    optimizer = method(model.parameters())

    def closure() -> float:
        nonlocal loss
        optimizer.zero_grad()
        loss = torch.tensor(0.0, dtype=torch.float64)
        loss += F.mse_loss(model(X), Y)
        loss.backward(retain_graph=True)
        return loss.item()

    assert [float(optimizer.step(closure)) for _ in range(2)] == pytest.approx(plainly(method, 2), rel=1e-9)


def test_options_written_into_groups_too_late_are_refused() -> None:
    """As skorch's set_params does; what schedules and frameworks write of their own is let be."""
    model = net()
    optimizer = imstep.NewtonKrylov(model.parameters())
    optimizer.param_groups[0]["their_own"] = 1
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    optimizer.param_groups[0]["max_trials"] = 3
    with pytest.raises(ValueError, match="max_trials"):
        optimizer.step(lambda: F.mse_loss(model(X), Y))


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_examples_and_what_was_tested() -> None:
    from benchmarks.frameworks.__main__ import FRAMEWORKS, ROOT, claims, rows, with_programs
    from benchmarks.record_page import load

    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    assert with_programs(page) == page
    assert {path.stem for path in (ROOT / "examples" / "frameworks").glob("*.py")} == {f"with_{n}" for n in FRAMEWORKS}
    runs = load("frameworks")["runs"]
    assert set(runs) == set(FRAMEWORKS)
    assert rows(runs) in page
    for name, run in runs.items():
        assert run["works"] == list(claims(ROOT / "tests" / "integrations" / f"test_{name}.py").values())
