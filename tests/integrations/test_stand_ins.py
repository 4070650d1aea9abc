"""The classes of imstep.integrations on stand-ins for their frameworks: these tests need none of them."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conventions import X, Y, net, plainly
from torch import Tensor, nn

import imstep


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
    single, several = type("SingleDeviceStrategy", (), {}), type("DDPStrategy", (), {})
    monitor = fake(
        monkeypatch,
        "lightning",
        lightning={},
        lightning__pytorch={"Callback": Plain},
        lightning__pytorch__callbacks={"StochasticWeightAveraging": type("Averaging", (), {})},
        lightning__pytorch__strategies={"SingleDeviceStrategy": single, "DDPStrategy": several},
    ).StepMonitor()
    logged: list[str] = []
    model = net()

    def training_step() -> Tensor:
        loss = F.mse_loss(model(X), Y)
        module.log("loss", loss)
        return loss

    module: Any = SimpleNamespace(
        log=lambda name, value: logged.append(name), log_dict=lambda d, **_: logged.extend(d),
        training_step=training_step, modules=model.modules,
    )  # fmt: skip
    optimizer = imstep.NewtonKrylov(model.parameters())
    settings = {"gradient_clip_val": None, "accumulate_grad_batches": 1, "precision_plugin": None, "strategy": single()}
    trainer = SimpleNamespace(optimizers=[optimizer], precision="32", callbacks=[], **settings)

    monitor.on_train_start(trainer, module)
    for _ in range(2):
        monitor.on_train_batch_start(trainer, module, None, 0)
        optimizer.step(lambda: module.training_step())
        monitor.on_train_batch_end(trainer, module, None, None, 0)
    monitor.teardown(trainer, module, "fit")
    assert logged.count("loss") == 2
    assert logged.count("step/new_loss") == 2
    for change in (
        {"gradient_clip_val": 1.0},
        {"accumulate_grad_batches": 2},
        {"strategy": object()},
        {"strategy": several(), "world_size": 2},
    ):
        differing = SimpleNamespace(optimizers=[optimizer], callbacks=[], **{**settings, **change})
        with pytest.raises(ValueError, match=r"Leave it out|process_group=torch.distributed.group.WORLD"):
            monitor.on_train_start(differing, module)
