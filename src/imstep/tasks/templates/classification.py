"""A classification problem for imstep: two moons.

    imstep train FILE          by NewtonKrylov
    imstep compare FILE        against Adam and L-BFGS; writes a report

Where to put your own data and network is marked by 1 to 4.
"""

import torch
from torch import nn

from imstep.tasks import ACCURACY, ExampleTask, held_out


# 1. Your data: inputs (k, ...) as floats and class numbers (k,) as integers 0, 1, ..., here drawn at random.
#    `data` is the folder given by `--data`, or None.
def load(data):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 2
    angle = torch.pi * torch.rand(600, generator=generator) + torch.pi * labels
    circle = torch.stack([angle.cos() + labels, angle.sin() + 0.5 * labels], 1)
    inputs = circle + 0.15 * torch.randn(600, 2, generator=generator)
    return held_out(inputs, labels, share=0.2)  # a fifth of the examples is never trained on


# 2. Your network: one output for each class. Smooth activations (tanh, GELU, SiLU) suit second-order methods.
def model():
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))


task = ExampleTask(
    name="NAME",
    title="Two moons",
    description="600 points of two half circles; MLP 2-32-32-2, tanh; cross entropy.",
    load=load,
    model=model,
    loss=nn.CrossEntropyLoss(),  # 3. Your loss: a mean over examples.
    metric=ACCURACY,  # 4. What you want to read besides the loss, or None.
)
