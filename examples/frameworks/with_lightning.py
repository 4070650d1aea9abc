"""PyTorch Lightning: a curve by regression, with a schedule.

    python examples/frameworks/with_lightning.py
"""

import lightning
import torch
from torch import nn

import imstep
from imstep.integrations.lightning import StepMonitor


class Curve(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> dict:
        optimizer = imstep.NewtonKrylov(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 20, gamma=0.9)}


lightning.seed_everything(0, verbose=False)
x = torch.linspace(-1, 1, 64)[:, None]
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (4 * x).sin()), batch_size=64)
trainer = lightning.Trainer(max_epochs=20, accelerator="cpu", logger=False, callbacks=[StepMonitor()])
trainer.fit(Curve(), loader)
print(f"final loss {trainer.callback_metrics['step/new_loss'].item():.1e}")
