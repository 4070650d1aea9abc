"""An autoencoder for imstep: pictures of blobs through a code of three numbers.

    imstep train FILE          by NewtonKrylov
    imstep compare FILE        against Adam and L-BFGS; writes a report

Where to put your own data and network is marked by 1 to 4.
"""

import torch
from torch import nn

from imstep.tasks import ExampleTask, held_out

SIDE = 12


# 1. Your data: the targets are the inputs themselves, here pictures (k, SIDE * SIDE) with values in 0 ... 1.
#    `data` is the folder given by `--data`, or None.
def load(data):
    generator = torch.Generator().manual_seed(0)
    x, y, width = 2 * torch.rand(3, 400, 1, 1, generator=generator) - 1
    axis = torch.linspace(-1.5, 1.5, SIDE)
    distance = (axis[None, None, :] - x) ** 2 + (axis[None, :, None] - y) ** 2
    pictures = torch.exp(-distance / (0.2 + 0.1 * width)).flatten(1)
    return held_out(pictures, pictures, share=0.2)  # a fifth of the examples is never trained on


# 2. Your network: outputs have the shape of the inputs.
def model():
    encoder = [nn.Linear(SIDE * SIDE, 48), nn.Tanh(), nn.Linear(48, 3)]
    decoder = [nn.Linear(3, 48), nn.Tanh(), nn.Linear(48, SIDE * SIDE), nn.Sigmoid()]
    return nn.Sequential(*encoder, *decoder)


task = ExampleTask(
    name="NAME",
    title="Blobs, autoencoder",
    description="400 pictures of blobs (12x12); MLP 144-48-3-48-144, tanh; mean squared error.",
    load=load,
    model=model,
    loss=nn.MSELoss(),  # 3. Your loss: a mean over examples.
    image_shape=(SIDE, SIDE),  # 4. Shows reconstructions in the report; leave it out where inputs are no pictures.
)
