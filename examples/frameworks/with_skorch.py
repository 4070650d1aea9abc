"""skorch: a regressor for scikit-learn.

    python examples/frameworks/with_skorch.py
"""

import numpy as np
import torch
from skorch import NeuralNetRegressor
from torch import nn

import imstep

torch.manual_seed(0)
x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
y = np.sin(4 * x)

net = NeuralNetRegressor(
    nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)),
    optimizer=imstep.NewtonKrylov,
    lr=1.0,  # skorch's own default, 0.01, would take a hundredth of each step
    max_epochs=20,
    batch_size=-1,
    train_split=None,
)
net.fit(x, y)
print(f"final loss {net.history[-1, 'train_loss']:.1e}")
