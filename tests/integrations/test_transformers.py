"""Hugging Face's Trainer and Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import imstep  # noqa: E402
from imstep.integrations.transformers import Trainer  # noqa: E402
from imstep.optim import NoPreconditioning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(0, 20, (32, 4), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": (row[0] >= 10).long()} for row in TOKENS]


class Classifier(nn.Module):
    """A model in Hugging Face's sense: gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
        logits = self.net(input_ids)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def newton(model: nn.Module) -> torch.optim.Optimizer:
    # Without Kronecker factors, which are drawn by sampling, batches in parts give the step of the whole to rounding.
    return imstep.NewtonKrylov(model.parameters(), preconditioning=NoPreconditioning())


def trained(
    folder: Path,
    steps: int = 3,
    kind: Any = Trainer,
    optimizer: Callable[..., Any] = newton,
    resume: Any = None,
    size: int = 16,
    **options: Any,
) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=size,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_grad_norm": 0, "lr_scheduler_type": "constant", **options},
    )
    model = Classifier()
    trainer = kind(model, arguments, train_dataset=DATA, optimizers=(optimizer(model), None))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_example(final_loss: Callable[[str], float]) -> None:
    """`imstep.integrations.transformers.Trainer`"""
    assert final_loss("transformers") < 1e-2


def test_loss_and_gradient_are_those_of_the_trainer(tmp_path: Path) -> None:
    """logs the loss and the gradient norm that Hugging Face's own Trainer logs"""
    sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.0)
    reference = trained(tmp_path / "a", kind=transformers.Trainer, optimizer=sgd, steps=1)
    ours = trained(tmp_path / "b", steps=1)
    for name in ("loss", "grad_norm"):
        assert logged(ours, name) == pytest.approx(logged(reference, name), rel=1e-4)
    assert ours.optimizer.optimizer.last_step.loss == pytest.approx(logged(ours, "loss")[0], rel=1e-4)


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    """`gradient_accumulation_steps`: the batches enter one step"""
    whole = trained(tmp_path / "a", size=16)
    parts = trained(tmp_path / "b", size=8, gradient_accumulation_steps=2)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-3)
    assert parts.state.global_step == 3


def test_schedules(tmp_path: Path) -> None:
    """`lr_scheduler_type`"""
    trainer = trained(tmp_path, steps=2, lr_scheduler_type="linear")
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0
    assert trainer.optimizer.optimizer.last_step.step_norm > 0


def test_checkpoint_and_resume(tmp_path: Path) -> None:
    """checkpoints: `train(resume_from_checkpoint=...)` continues as if uninterrupted"""
    whole = trained(tmp_path, steps=4)
    again = trained(tmp_path, steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert logged(again, "loss")[-2:] == pytest.approx(logged(whole, "loss")[-2:], abs=1e-4)


def test_bfloat16(tmp_path: Path) -> None:
    """`bf16=True`"""
    losses = logged(trained(tmp_path, bf16=True), "loss")
    assert losses[-1] < losses[0]


def test_groups_of_the_trainer(tmp_path: Path) -> None:
    """`optimizer_cls_and_kwargs=(imstep.NewtonKrylov, {})`, `weight_decay` of weights but not of biases"""
    arguments = transformers.TrainingArguments(str(tmp_path), weight_decay=0.1, max_grad_norm=0, use_cpu=True)
    trainer = Trainer(Classifier(), arguments, optimizer_cls_and_kwargs=(imstep.NewtonKrylov, {}))
    groups = trainer.create_optimizer().param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [(0.1, {2}), (0.0, {1})]


@pytest.mark.parametrize(
    ("options", "words"), [({"max_grad_norm": 1.0}, "max_step_norm"), ({"fp16": True}, "bf16=True")]
)
def test_refused_when_the_trainer_is_made(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """refused: `max_grad_norm` above 0, `fp16`, several devices"""
    with pytest.raises(ValueError, match=words):
        trained(tmp_path, steps=1, **options)


def test_the_trainer_of_transformers_alone(tmp_path: Path) -> None:
    """without our Trainer: error that says what to do"""
    with pytest.raises(TypeError, match=r"imstep\.integrations"):
        trained(tmp_path, kind=transformers.Trainer)
