"""PyTorch Lightning."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import LearningRateMonitor, StochasticWeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

import imstep  # noqa: E402
from imstep.integrations.lightning import StepMonitor  # noqa: E402
from tests.launching import launch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.linspace(-1, 1, 32)[:, None]
Y = (4 * X).sin()


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1))
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        step = self.trainer.optimizers[0].last_step
        self.losses += [] if step is None else [step.loss]

    def configure_optimizers(self) -> Any:
        optimizer = imstep.NewtonKrylov(self.parameters(), process_group=torch.distributed.group.WORLD)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]


class ByHand(Module):
    """Two networks, each with an optimizer, by manual optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):

            def closure(net: nn.Module = net, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(net(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            self.log("returned", optimizer.step(closure))

    def configure_optimizers(self) -> Any:
        return imstep.NewtonKrylov(self.net.parameters()), imstep.LeastSquares(self.other.parameters())


def fit(
    epochs: int = 3, size: int = 32, resume: Any = None, callbacks: Any = (), kind: Any = None, **options: Any
) -> Any:
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        **options,
    )
    module = (kind or Module)()
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=size), ckpt_path=resume)
    return trainer, module


def plainly(steps: int) -> list[float]:
    """The losses of a loop of one's own."""
    net = Module().net
    optimizer = imstep.NewtonKrylov(net.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    losses = []
    for _ in range(steps):
        losses.append(float(optimizer.step(lambda: nn.functional.mse_loss(net(X), Y))))
        schedule.step()
    return losses


def test_example(final_loss: Callable[[str], float]) -> None:
    """`configure_optimizers` returns the optimizer"""
    assert final_loss("lightning") < 1e-3


def test_steps_schedule_and_rates(tmp_path: Path) -> None:
    """steps equal those of a plain loop; schedules, `LearningRateMonitor`"""
    trainer, module = fit(logger=CSVLogger(tmp_path), callbacks=[LearningRateMonitor()])
    assert module.losses == pytest.approx(plainly(3), rel=1e-5)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    assert float(trainer.callback_metrics["lr-NewtonKrylov"]) == 0.5
    assert trainer.global_step == 3


def test_a_module_logs_once_per_batch() -> None:
    """`StepMonitor`: `self.log` counts each batch once, and steps are logged"""
    trainer, module = fit(epochs=2, size=16, callbacks=[StepMonitor()])
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(sum(module.losses[-2:]) / 2, rel=1e-5)
    step = trainer.optimizers[0].last_step
    assert float(trainer.callback_metrics["step/new_loss"]) == pytest.approx(step.new_loss)
    assert "log" not in module.__dict__


def test_hooks_after_the_first_evaluation_log() -> None:
    class Watched(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log("norm", torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm())

    figures = fit(kind=Watched, callbacks=[StepMonitor()])[0].callback_metrics
    assert float(figures["norm"]) == pytest.approx(float(figures["step/gradient_norm"]), rel=1e-5)


def test_manual_optimisation_with_two_optimizers() -> None:
    trainer, _ = fit(kind=ByHand, callbacks=[StepMonitor()])
    figures = trainer.callback_metrics
    for k, optimizer in enumerate(trainer.optimizers):
        assert float(figures[f"step-{k}/loss"]) == pytest.approx(optimizer.last_step.loss)
    assert float(figures["returned"]) == pytest.approx(trainer.optimizers[1].last_step.loss)


def test_averaged_weights_with_batch_normalisation_are_refused() -> None:
    class Normalised(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(10))

    averaging = StochasticWeightAveraging(1.0, swa_epoch_start=1)
    with pytest.raises(ValueError, match="WeightAveraging of the same package"):
        fit(kind=Normalised, callbacks=[StepMonitor(), averaging])
    assert len(fit(callbacks=[StepMonitor(), averaging])[1].losses) == 3


def test_checkpoint_and_resume(tmp_path: Path) -> None:
    """`save_checkpoint`, `fit(ckpt_path=...)`: continues as if uninterrupted"""
    _, whole = fit(epochs=4)
    first, _ = fit(epochs=2)
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer, module = fit(epochs=4, resume=tmp_path / "last.ckpt")
    assert trainer.global_step == 4
    assert module.losses == pytest.approx(whole.losses[2:], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(precision: str) -> None:
    """`precision="bf16-mixed"`, `"64-true"`; `"16-mixed"` runs as bfloat16 on CPUs"""
    _, module = fit(precision=precision)
    assert module.losses[-1] < module.losses[0]
    assert module.losses[0] == pytest.approx(plainly(1)[0], rel=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_clip_val": 0.1}, "max_step_norm"),
        ({"accumulate_grad_batches": 2}, "larger batches"),
    ],
)
def test_refused_when_training_starts(options: dict[str, Any], words: str) -> None:
    """`StepMonitor` refuses when training starts: `gradient_clip_val`, `accumulate_grad_batches`"""
    with pytest.raises(ValueError, match=words):
        fit(callbacks=[StepMonitor()], size=16, **options)


@pytest.mark.parametrize("options", [{"gradient_clip_val": 1e-3}, {"accumulate_grad_batches": 2}])
def test_refused_without_the_monitor(options: dict[str, Any]) -> None:
    """the same refusals from the step itself, where gradients are clipped or accumulated"""
    with pytest.raises(ValueError, match=r"clipping|earlier batches"):
        fit(size=16, **options)


def test_scalers_and_strategies_are_refused() -> None:
    """and `precision="16-mixed"` on a GPU, and `strategy="ddp"` without `process_group=`"""
    monitor = StepMonitor()
    optimizer = imstep.NewtonKrylov(Module().parameters())
    scaled = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    scaled.precision_plugin.scaler = object()  # Lightning makes one on GPUs only
    spread = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, strategy="ddp", devices=2)
    for trainer, words in ((scaled, "bf16-mixed"), (spread, "process_group=torch.distributed.group.WORLD")):
        trainer.strategy.optimizers = [optimizer]
        with pytest.raises(ValueError, match=words):
            monitor.on_train_start(trainer, Module())


def test_several_processes() -> None:
    """`strategy="ddp"` with `process_group=`: steps equal those of one process"""

    def losses(rank: int) -> list[float]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
        os.environ.update(TORCHELASTIC_RUN_ID="none", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        return fit(size=16, strategy="ddp", devices=2, callbacks=[StepMonitor()])[1].losses

    first, second = launch(2, losses, timeout=60.0)["losses"]
    assert first == second
    assert first == pytest.approx(fit()[1].losses, rel=5e-3)  # roundings of float32 grow from step to step


@pytest.mark.parametrize("method", [imstep.LeastSquares, imstep.NewtonKrylov])
def test_fabric(method: Any, tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    def started() -> tuple[nn.Module, Any]:
        model = Module().net
        return model, method(model.parameters())

    def stepped(model: Any, optimizer: Any, backward: Callable[[Tensor], None]) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X), Y)
            backward(loss)
            return loss

        return float(optimizer.step(closure))

    model, optimizer = started()
    expected = [stepped(model, optimizer, lambda loss: loss.backward()) for _ in range(4)]
    fabric, losses = Fabric(accelerator="cpu", devices=1), []
    for _ in range(2):  # the second continues the first
        model, optimizer = fabric.setup(*started())
        if losses:
            fabric.load(tmp_path / "state", {"model": model, "optimizer": optimizer})
        losses += [stepped(model, optimizer, fabric.backward) for _ in range(2)]
        fabric.save(tmp_path / "state", {"model": model, "optimizer": optimizer})
    assert losses == pytest.approx(expected, rel=1e-6)
    assert optimizer.last_step.step == 3
