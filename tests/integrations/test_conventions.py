"""What frameworks do with an optimizer, in a few lines each: these tests need none of them."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imstep

X = torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None]
Y = (4 * X).sin()
METHODS = [imstep.NewtonKrylov, imstep.LeastSquares]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def plainly(method: Any, steps: int) -> list[float]:
    model = net()
    optimizer = method(model.parameters())
    return [float(optimizer.step(lambda: F.mse_loss(model(X), Y))) for _ in range(steps)]


def fake(monkeypatch: pytest.MonkeyPatch, integration: str, **modules: dict[str, Any]) -> Any:
    """A module of imstep.integrations, on stand-ins for what it imports; ``__`` stands for a dot."""
    for name, contents in modules.items():
        module = types.ModuleType(name.replace("__", "."))
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)
    monkeypatch.delitem(sys.modules, f"imstep.integrations.{integration}", raising=False)
    found = importlib.import_module(f"imstep.integrations.{integration}")
    monkeypatch.delitem(sys.modules, f"imstep.integrations.{integration}")
    return found


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


# --- the classes that are ours ------------------------------------------------------------------------------------


class State:
    """accelerate.state.GradientState."""

    def __init__(self) -> None:
        self.sync_gradients = True

    def _set_sync_gradients(self, value: bool) -> None:
        self.sync_gradients = value


class Prepared:
    """accelerate.optimizer.AcceleratedOptimizer: passes calls on where it is time."""

    def __init__(self, optimizer: Any, state: State) -> None:
        self.optimizer, self.state = optimizer, state

    def zero_grad(self) -> None:
        if self.state.sync_gradients:
            self.optimizer.zero_grad()

    def step(self, closure: Any = None) -> None:
        if self.state.sync_gradients:
            self.optimizer.step(closure)


class HuggingFace:
    """transformers.Trainer: goes backward for each batch, then calls step() without a closure."""

    def __init__(self, model: nn.Module, args: Any, optimizer: Any, accumulate: int = 1) -> None:
        self.args, self.accelerator = args, SimpleNamespace(gradient_state=State())
        self.model, self.optimizer = model, Prepared(optimizer, self.accelerator.gradient_state)
        self.accumulate = accumulate

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = F.mse_loss(model(inputs[0]), inputs[1]) / self.accumulate
        loss.backward()
        return loss.detach()

    def train(self, batches: Any) -> list[float]:
        losses, total = [], 0.0
        for number, batch in enumerate(batches, 1):
            last = number % self.accumulate == 0
            self.accelerator.gradient_state._set_sync_gradients(last)
            total += float(self.training_step(self.model, batch))
            if last:
                self.optimizer.step()
                self.model.zero_grad()
                losses.append(total)
                total = 0.0
        return losses


ARGUMENTS = {"max_grad_norm": 0, "fp16": False, "n_gpu": 0, "world_size": 1, "device": "cpu"}


def test_a_trainer_of_hugging_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fake(monkeypatch, "transformers", transformers={"Trainer": HuggingFace}).Trainer
    whole = net()
    newton = imstep.LeastSquares(whole.parameters())
    losses = trainer(whole, SimpleNamespace(**ARGUMENTS), newton).train([(X, Y)] * 3)
    assert losses == pytest.approx(plainly(imstep.LeastSquares, 3), rel=1e-9)
    parts = net()
    optimizer = imstep.LeastSquares(parts.parameters())
    halves = list(zip(X.chunk(2), Y.chunk(2), strict=True)) * 3
    found = trainer(parts, SimpleNamespace(**ARGUMENTS), optimizer, accumulate=2).train(halves)
    assert found == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=0"),
        ({"fp16": True}, "bf16=True"),
        ({"n_gpu": 2}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_a_trainer_refuses(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str) -> None:
    trainer = fake(monkeypatch, "transformers", transformers={"Trainer": HuggingFace}).Trainer
    with pytest.raises(ValueError, match=words):
        trainer(net(), SimpleNamespace(**{**ARGUMENTS, **change}), None)


def test_accumulation_as_accelerates() -> None:
    from imstep.integrations.accelerate import ClosureStep

    state, model = State(), net()
    optimizer = imstep.LeastSquares(model.parameters())
    accelerator: Any = SimpleNamespace(scaler=None, num_processes=1, backward=lambda loss: (loss / 2).backward())
    step = ClosureStep(accelerator, Prepared(optimizer, state))
    returned = []
    for number, batch in enumerate(zip(X.chunk(2), Y.chunk(2), strict=True)):
        state.sync_gradients = accelerator.sync_gradients = number == 1
        returned.append(step(lambda x, y: F.mse_loss(model(x), y), *batch))
    assert returned[0] is None
    assert float(returned[1]) == pytest.approx(plainly(imstep.LeastSquares, 1)[0])
    assert optimizer.last_step.loss == pytest.approx(float(returned[1]))


def test_a_factory_as_ignites(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = lambda batch, device=None, non_blocking=False: batch
    engine = {"Engine": lambda update: update, "_prepare_batch": prepare}
    create = fake(monkeypatch, "ignite", ignite={}, ignite__engine=engine).create_supervised_trainer
    model = net()
    update = create(model, imstep.NewtonKrylov(model.parameters()), nn.MSELoss())
    assert [update(None, (X, Y)) for _ in range(2)] == pytest.approx(plainly(imstep.NewtonKrylov, 2), rel=1e-9)


class Scimba(torch.optim.Optimizer):
    """scimba_torch.optimizers.scimba_optimizers.ScimbaCustomOptomizer."""

    def __init__(self, params: Any, optimizer_args: Any = {}, **kwargs: Any) -> None:  # noqa: B006
        super().__init__(params, **optimizer_args)

    def step(self, closure: Any) -> None:
        """Abstract there."""

    def optimizer_step(self, closure: Callable[[], float]) -> None:
        self.inner_step(closure)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["NewtonKrylov", "LeastSquares"])
def test_a_class_as_scimbas(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    modules: dict[str, Any] = {"scimba_torch": {}, "scimba_torch__optimizers": {}}
    modules["scimba_torch__optimizers__scimba_optimizers"] = {"ScimbaCustomOptomizer": Scimba}
    kind = getattr(fake(monkeypatch, "scimba", **modules), f"Scimba{name}")
    model = net()
    optimizer = kind(list(model.parameters()), optimizer_args={"max_trials": 9})
    optimizer.optimizer_step(lambda: F.mse_loss(model(X), Y))
    assert optimizer.last_step.loss == pytest.approx(plainly(getattr(imstep, name), 1)[0])
    assert optimizer.last_step.new_loss < optimizer.last_step.loss


class Labelled(Tensor):
    """pina.LabelTensor."""

    def __new__(cls, x: Any, labels: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls, x, *args, **kwargs)

    def __init__(self, x: Any, labels: Any) -> None:
        self.labels = labels


def test_labels_as_pinas(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = type("TorchOptimizer", (), {"__init__": lambda self, kind, **options: None})
    module = fake(monkeypatch, "pina", pina={"LabelTensor": Labelled}, pina__optim={"TorchOptimizer": wrapper})
    module.TorchOptimizer(imstep.LeastSquares)
    model = net()
    optimizer = imstep.LeastSquares(model.parameters())
    closure = lambda: F.mse_loss(Labelled(model(Labelled(X, ["x"])), ["u"]), Y)
    assert float(optimizer.step(closure)) == pytest.approx(plainly(imstep.LeastSquares, 1)[0])
    assert Labelled(X, ["x"]).labels == ["x"]


class Plain:
    """What a callback of Lightning's derives from."""


def test_a_module_logs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    single = type("SingleDeviceStrategy", (), {})
    monitor = fake(
        monkeypatch,
        "lightning",
        lightning={},
        lightning__pytorch={"Callback": Plain},
        lightning__pytorch__strategies={"SingleDeviceStrategy": single},
    ).StepMonitor()
    logged: list[str] = []
    module: Any = SimpleNamespace(log=lambda name, value: logged.append(name), log_dict=lambda d, **_: logged.extend(d))
    model = net()
    optimizer = imstep.NewtonKrylov(model.parameters())
    settings = {"gradient_clip_val": None, "accumulate_grad_batches": 1, "precision_plugin": None, "strategy": single()}
    trainer = SimpleNamespace(optimizers=[optimizer], precision="32", **settings)

    def closure() -> Tensor:
        loss = F.mse_loss(model(X), Y)
        module.log("loss", loss)
        monitor.on_before_backward(trainer, module, loss)
        return loss

    monitor.on_train_start(trainer, module)
    for _ in range(2):
        monitor.on_train_batch_start(trainer, module, None, 0)
        optimizer.step(closure)
        monitor.on_train_batch_end(trainer, module, None, None, 0)
    monitor.teardown(trainer, module, "fit")
    assert logged.count("loss") == 2
    assert logged.count("step/new_loss") == 2
    for change in ({"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}, {"strategy": object()}):
        with pytest.raises(ValueError, match=r"Leave it out|devices=1"):
            monitor.on_train_start(SimpleNamespace(optimizers=[optimizer], **{**settings, **change}), module)


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
