"""Hugging Face's Accelerate: a curve by regression, in bfloat16 where autocast wants it.

    python examples/frameworks/with_accelerate.py
"""

import torch
from accelerate import Accelerator
from torch import nn

import imstep

torch.manual_seed(0)
x = torch.linspace(-1, 1, 64)[:, None]
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (4 * x).sin()), batch_size=64)
model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
newton = imstep.NewtonKrylov(model.parameters())

accelerator = Accelerator(cpu=True, mixed_precision="bf16")
model, optimizer, loader = accelerator.prepare(model, newton, loader)
for _ in range(20):
    for inputs, targets in loader:

        def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)  # a prepared optimizer returns nothing; newton.last_step tells the loss
print(f"final loss {newton.last_step.new_loss:.1e}")
