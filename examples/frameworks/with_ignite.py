"""PyTorch-Ignite: a curve by regression.

    python examples/frameworks/with_ignite.py
"""

import torch
from ignite.engine import Engine, Events
from torch import nn

import imstep
from imstep.integrations.ignite import create_supervised_trainer

torch.manual_seed(0)
x = torch.linspace(-1, 1, 64)[:, None]
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (4 * x).sin()), batch_size=64)
model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))

trainer = create_supervised_trainer(model, imstep.NewtonKrylov(model.parameters()), nn.MSELoss())


@trainer.on(Events.EPOCH_COMPLETED(every=5))
def report(engine: Engine) -> None:
    print(f"epoch {engine.state.epoch}  loss {engine.state.output:.1e}")


print(f"final loss {trainer.run(loader, max_epochs=20).output:.1e}")
