"""A regression problem for imstep: a noisy wave.

    imstep train FILE                     by NewtonKrylov
    imstep train FILE -o least-squares    for few residuals, often the best here
    imstep compare FILE                   against Adam and L-BFGS; writes a report

Where to put your own data and network is marked by 1 to 4.
"""

import torch
from torch import nn

from imstep.tasks import ExampleTask, Metric, held_out


# 1. Your data: inputs (k, d) and targets (k, m) as floats, here drawn at random.
#    `data` is the folder given by `--data`, or None. Scale inputs and targets to about -1 ... 1.
def load(data):
    generator = torch.Generator().manual_seed(0)
    inputs = 6 * torch.rand(400, 1, generator=generator) - 3
    targets = torch.sin(2 * inputs) + 0.05 * torch.randn(400, 1, generator=generator)
    return held_out(inputs, targets, share=0.2)  # a fifth of the examples is never trained on


# 2. Your network. Smooth activations (tanh, GELU, SiLU) suit second-order methods.
def model():
    return nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))


# 4. What you want to read besides the loss: here the root of the mean square error, in units of the target.
def squares(outputs, targets):
    return (outputs - targets).square().mean(1)


task = ExampleTask(
    name="NAME",
    title="A noisy wave",
    description="400 points of sin 2x with noise of 0.05; MLP 1-24-24-1, tanh; mean squared error.",
    load=load,
    model=model,
    loss=nn.MSELoss(),  # 3. Your loss: a mean over examples.
    metric=Metric("RMSE", squares, of_mean=lambda mean: mean**0.5),
)
